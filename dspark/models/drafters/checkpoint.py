"""Drafter checkpoints on disk: the published DeepSpec layout, and this project's leaner one of the same names.

A published checkpoint carries copies of the target's embedding and output head and is complete by itself. Ours leaves
them out (they come from the target's own files) and may hold `d2t` (draft vocabulary,) int64 with target = i + d2t[i]
and `t2d` (vocab,) bool, `mask_embedding` and `fc.bias`. Nothing here unpickles anything.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dspark.errors import ModelFileError
from dspark.files import write_json
from dspark.models.config import read_json
from dspark.models.drafters.base import Drafter
from dspark.models.drafters.chain import ChainDrafter
from dspark.models.drafters.config import DrafterConfig, parse_drafter_config, to_json
from dspark.models.drafters.dspark import DFlashDrafter, DSparkDrafter
from dspark.models.gguf import GgufSource
from dspark.models.weights import SafetensorsSource, TensorSource, check_tensor, for_lookup, write_tensors

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CLASSES: dict[str, type[Drafter]] = {
    "dspark": DSparkDrafter,
    "dflash": DFlashDrafter,
    "eagle3": ChainDrafter,
    "mtp": ChainDrafter,
}


def load_drafter(path: Path, *, target_path: Path | None, dtype: torch.dtype, device: torch.device) -> Drafter:
    """The drafter in directory `path`, ready to serve.

    `target_path` (Hugging Face directory or .gguf file) gives embedding and output head where the checkpoint lacks
    them; ModelFileError names the file and what is missing, unreadable or of another shape.
    """
    config = parse_drafter_config(read_json(path / CONFIG_FILE), source=str(path / CONFIG_FILE))
    tensors = _read(path / WEIGHTS_FILE)
    source = str(path / WEIGHTS_FILE)
    d2t = _draft_vocabulary(tensors, config, source)
    embed, head = _target_tensors(tensors, config, d2t, source, target_path, dtype)
    drafter = CLASSES[config.architecture](config, embed_weight=embed[:0], head_weight=head, d2t=d2t).to(dtype)
    drafter.embed_weight = embed  # only now: it keeps the dtype of its file and stays mapped from it
    _fill(drafter, tensors, source)
    return drafter.to(device).eval().requires_grad_(requires_grad=False)


def save_drafter(drafter: Drafter, path: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors without the target's tensors; each file appears whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in drafter.state_dict().items()}
    if drafter.d2t is not None:
        d2t = drafter.d2t.cpu()
        t2d = torch.zeros(drafter.config.vocab_size, dtype=torch.bool)
        t2d[torch.arange(len(d2t)) + d2t] = True
        tensors |= {"d2t": d2t, "t2d": t2d}
    write_tensors(path / WEIGHTS_FILE, tensors)
    write_json(path / CONFIG_FILE, to_json(drafter.config))


def target_tensors(target_path: Path, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A target's embedding and output head, each (vocab, d); one tensor twice where they are tied.

    Either may be narrower than `dtype`, as `TensorSource.lookup` says.
    """
    if target_path.is_file():
        return _embedding_and_head(GgufSource(target_path), vocab_size, hidden_size, dtype)
    with SafetensorsSource(target_path) as source:
        return _embedding_and_head(source, vocab_size, hidden_size, dtype)


def _embedding_and_head(source: TensorSource, vocab: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    embed = source.lookup("model.embed_tokens.weight", (vocab, hidden), dtype)
    tied = "lm_head.weight" not in source
    return embed, embed if tied else source.lookup("lm_head.weight", (vocab, hidden), dtype)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: not a readable safetensors file: {error}") from error


def _draft_vocabulary(tensors: dict[str, Tensor], config: DrafterConfig, source: str) -> Tensor | None:
    d2t, _ = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if not config.reduced_vocabulary:
        return None
    if d2t is None:
        raise ModelFileError(f"{source}: tensor d2t is missing, though the config names a draft vocabulary")
    check_tensor(tuple(d2t.shape), (config.draft_vocab_size,), f"{source}: tensor d2t")
    ids = torch.arange(len(d2t)) + d2t.to(torch.int64)
    if not bool((ids[1:] > ids[:-1]).all()) or int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
        raise ModelFileError(f"{source}: d2t does not map to ascending token ids below {config.vocab_size}")
    return d2t.to(torch.int64)


def _target_tensors(
    tensors: dict[str, Tensor],
    config: DrafterConfig,
    d2t: Tensor | None,
    source: str,
    target_path: Path | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Embedding (vocab, d) and head (draft vocab, d), from the checkpoint where it has both, else from the target."""
    embed, head = tensors.pop("embed_tokens.weight", None), tensors.pop("lm_head.weight", None)
    if embed is None or head is None:
        if target_path is None:
            raise ModelFileError(f"{source}: holds no embedding and output head, so the target's path is needed")
        embed, head = target_tensors(target_path, config.vocab_size, config.hidden_size, dtype)
    check_tensor(tuple(embed.shape), (config.vocab_size, config.hidden_size), f"{source}: tensor embed_tokens.weight")
    if d2t is not None and len(head) == config.vocab_size:
        head = head[torch.arange(len(d2t)) + d2t]
    check_tensor(tuple(head.shape), (config.draft_vocab_size, config.hidden_size), f"{source}: tensor lm_head.weight")
    return for_lookup(embed, dtype), head.to(dtype)


def _fill(drafter: Drafter, tensors: dict[str, Tensor], source: str) -> None:
    """Copy the drafter's own tensors in; every one must be there, of its shape, and none may be left over."""
    own = drafter.state_dict()
    for name, parameter in own.items():
        if name not in tensors:
            raise ModelFileError(f"{source}: tensor {name} is missing")
        check_tensor(tuple(tensors[name].shape), tuple(parameter.shape), f"{source}: tensor {name}")
        if not tensors[name].is_floating_point():
            raise ModelFileError(f"{source}: tensor {name} holds {tensors[name].dtype}, not floating-point numbers")
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise ModelFileError(f"{source}: holds unknown tensors: {', '.join(unknown)}")
    drafter.load_state_dict(tensors)
