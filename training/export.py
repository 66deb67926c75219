"""Writes a drafter in the published DeepSpec layout, which carries the target's embedding and output head with it.

That layout knows Qwen3-type layers, the whole vocabulary and a plain tap; what it cannot hold is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dspark.errors import ConfigError
from dspark.files import write_json
from dspark.models.drafters import Drafter, DrafterConfig, load_drafter
from dspark.models.drafters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from dspark.models.weights import write_tensors

__all__ = ["export_deepspec", "misfits"]


def misfits(config: DrafterConfig) -> list[str]:
    """Why the published layout cannot hold such a drafter; empty where it can."""
    reasons = {
        f"it is a {config.architecture} drafter, not dspark": config.architecture != "dspark",
        f"it drafts {config.draft_vocab_size} of {config.vocab_size} tokens": config.reduced_vocabulary,
        "its tap has a bias (train with --plain-tap)": config.fc_bias,
        "its tap normalises hidden states (train with --plain-tap)": config.normalize_inputs,
        "its mask embedding is learned (train with --plain-tap)": config.learned_mask,
        f"embeddings are scaled by {config.embedding_scale:g}": config.embedding_scale != 1.0,
        "it takes hints": bool(config.hint_lengths),
        f"its activation is {config.hidden_act}, not silu": config.hidden_act != "silu",
        f"its layers have {len(set(config.rope_thetas))} rotary bases": len(set(config.rope_thetas)) > 1,
    }
    return [reason for reason, misfit in reasons.items() if misfit]


def export_deepspec(drafter: Drafter, directory: Path) -> None:
    """Write `config.json` and `model.safetensors`, and read them back.

    Raises:
        ConfigError: the layout cannot hold the drafter, the directory is taken, or the disk refuses.
    """
    reasons = misfits(drafter.config)
    if reasons:
        raise ConfigError(f"the published layout cannot hold {drafter.config.name!r}: {'; '.join(reasons)}")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty")
    tensors = drafter.state_dict() | {
        "embed_tokens.weight": drafter.embed_weight,
        "lm_head.weight": drafter.head_weight,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {directory}: {error}") from error
    own = {name: tensor.detach().cpu().bfloat16().clone().contiguous() for name, tensor in tensors.items()}
    write_tensors(directory / WEIGHTS_FILE, own)
    write_json(directory / CONFIG_FILE, published_config(drafter.config))
    _check(drafter, directory)


def published_config(config: DrafterConfig) -> dict[str, Any]:
    """The published fields, and none of ours."""
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": config.block_size,
        "confidence_head_with_markov": config.confidence_with_markov,
        "dtype": "bfloat16",
        "enable_confidence_head": config.confidence_head,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "markov_head_type": config.markov_head_type,
        "markov_rank": config.markov_rank,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "num_anchors": 512,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_thetas[0],
        "sliding_window": None,
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _check(drafter: Drafter, directory: Path) -> None:
    """What was written is what a reader gets, with no target at hand."""
    read = load_drafter(directory, target_path=None, dtype=torch.bfloat16, device=torch.device("cpu"))
    for name, tensor in drafter.state_dict().items():
        if not torch.equal(read.state_dict()[name], tensor.detach().cpu().bfloat16()):
            raise ConfigError(f"{directory}: tensor {name} came back changed")
