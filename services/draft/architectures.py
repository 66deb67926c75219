"""Which drafter is served: loaded, and the implementation that serves its architecture. Both once, at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dspark.errors import ConfigError
from dspark.kernels import Kernels
from dspark.models.config import TargetConfig, parse_config, read_config
from dspark.models.drafters import ChainDrafter, DFlashDrafter, Drafter, DSparkDrafter, load_drafter
from dspark.models.gguf import GgufSource
from dspark.sampling import DraftChooser
from services.draft.chain import ChainBlocks
from services.draft.dflash import DFlashBlocks
from services.draft.drafting import BlockDrafter
from services.draft.dspark import DSparkBlocks
from services.draft.ngram import NgramBlocks, PromptLookup

__all__ = ["NGRAM", "block_drafter", "load"]

NGRAM = "ngram"
"""In place of a drafter's directory: prompt lookup."""


def load(drafter: Path, target: Path | None, *, dtype: torch.dtype, device: torch.device) -> Drafter | PromptLookup:
    """The drafter of a directory, or prompt lookup. `ModelFileError`, or `ConfigError` where it lacks a target."""
    if str(drafter) != NGRAM:
        return load_drafter(drafter, target_path=target, dtype=dtype, device=device)
    if target is None:
        raise ConfigError("drafter ngram: the target is needed, for its vocabulary")
    return PromptLookup(_config_of(target).vocab_size)


def block_drafter(
    drafter: Drafter | PromptLookup, chooser: DraftChooser, kernels: Kernels, *, positions: int
) -> BlockDrafter[Any]:
    """What serves a drafter, with `positions` of context in all. `ConfigError` where nothing serves its kind."""
    match drafter:
        case PromptLookup():
            return NgramBlocks(drafter)
        case DSparkDrafter():
            return DSparkBlocks(drafter, chooser, kernels, positions)
        case DFlashDrafter():
            return DFlashBlocks(drafter, chooser, kernels, positions)
        case ChainDrafter():
            return ChainBlocks(drafter, chooser, kernels, positions)
    raise ConfigError(f"no implementation serves a drafter of kind {type(drafter).__name__}")


def _config_of(target: Path) -> TargetConfig:
    if target.is_file():
        return parse_config(GgufSource(target).config, source=str(target))
    return read_config(target)
