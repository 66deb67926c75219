"""A tiny target and a drafter that knows its bigrams: in every setting some drafts are accepted and some are not."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dspark.models.drafters import Drafter, load_drafter
from dspark.models.target import TargetModel
from support import drafters, targets, tiny

VOCAB = drafters.VOCAB
EOS = 1


OURS: dict[str, Any] = {"architectures": ["DSparkModel"], "hint_lengths": [1, 2, 3], "cut_lengths": [1, 2]}
"""What a drafter's config may have beyond the published format."""


def save_pair(
    root: Path, *, block: int = 5, dtype: torch.dtype = torch.float32, ours: bool = False, **changes: Any
) -> tuple[Path, Path]:
    """Directories of a target of `drafters.VOCAB` tokens and its drafter; `ours` gives that hints and cut blocks."""
    settings: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": drafters.HIDDEN, "num_hidden_layers": 5}
    target = tiny.save_qwen3(root / "target", dtype=dtype, initializer_range=0.25, **(settings | changes))
    _calm(target / "model.safetensors")
    tensors = drafters.published_tensors()
    bigrams = _bigrams(targets.load(target))
    tensors["markov_head.markov_w1.weight"] = torch.eye(VOCAB)
    tensors["markov_head.markov_w2.weight"] = bigrams.T.contiguous()
    tensors["confidence_head.proj.weight"] = torch.cat([tensors["confidence_head.proj.weight"], torch.zeros(1, 88)], 1)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 0.3  # so that features matter, and bigrams too
    tensors |= _hints(len(OURS["hint_lengths"]) + 1) if ours else {}
    path = root / "drafter"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = drafters.published_config(block_size=block, markov_rank=VOCAB, **(OURS if ours else {}))
    (path / "config.json").write_text(json.dumps(config))
    return target, path


def _hints(kinds: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "hints.proj.weight": 0.1 * torch.randn(drafters.HIDDEN, drafters.HIDDEN, generator=generator),
        "hints.kind.weight": 0.3 * torch.randn(kinds, drafters.HIDDEN, generator=generator),
        "hints.strength": 0.5 + torch.rand(kinds, generator=generator),
    }


def load_pair(pair: tuple[Path, Path], dtype: torch.dtype = torch.float32) -> tuple[TargetModel, Drafter]:
    """Both, ready to run."""
    drafter = load_drafter(pair[1], target_path=pair[0], dtype=dtype, device=targets.CPU)
    return targets.load(pair[0], dtype), drafter


def _calm(path: Path, scale: float = 0.05) -> None:
    """Let a target's layers add less, so that its next token depends most on the last one."""
    tensors = load_file(path)
    calmed = {n: t * scale if "o_proj" in n or "down_proj" in n else t for n, t in tensors.items()}
    save_file(calmed, path, metadata={"format": "pt"})


def _bigrams(target: TargetModel) -> torch.Tensor:
    """(previous, next) logits of the target right behind the first token."""
    rows = []
    for token in range(VOCAB):
        _, hidden = targets.prefill(target, targets.new_cache(target, prefix_cache=False), [2, token])
        rows.append(target.logits(hidden[-1:])[0].float())
    table = torch.stack(rows)
    return table - table.mean(-1, keepdim=True)
