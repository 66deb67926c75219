"""What a run begins with that begins with a drafter: the end of another run, or a finished checkpoint.

A run keeps its drafter as it is trained, over standardised states, beside the standardisation. A checkpoint has that
folded into W_c, so that another is measured on the new run's data and taken out of W_c again. Leaves a run's own state
to `training.state`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dspark.errors import ConfigError
from dspark.models.drafters import Drafter
from dspark.models.drafters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from training.initialise import Standardisation
from training.state import SETUP_FILE, STATE_FILE, load_setup

__all__ = ["begin_with", "beginning_of", "check_beginning"]

_LAYER = re.compile(r"layers\.(\d+)\.")


def check_beginning(path: Path) -> None:
    """`ConfigError` where `path` is neither a run's directory nor a checkpoint's."""
    if (path / SETUP_FILE).exists() or not (path / CONFIG_FILE).exists():
        load_setup(path)


def beginning_of(path: Path) -> tuple[Tensor | None, Standardisation | None]:
    """The draft vocabulary d2t and the standardisation that a run or checkpoint prescribes; None where it does not."""
    if (path / SETUP_FILE).exists():
        return load_setup(path)
    return _tensors(path / WEIGHTS_FILE).get("d2t"), None


@torch.no_grad()
def begin_with(path: Path, drafter: Drafter, standardisation: Standardisation) -> None:
    """Fill a drafter that reads standardised states; `ConfigError` where there is nothing or it does not fit."""
    run = (path / SETUP_FILE).exists()
    tensors = _tensors(path / (STATE_FILE if run else WEIGHTS_FILE))
    if any("hints." in name for name in tensors) and not drafter.config.hint_lengths:
        raise ConfigError(f"the drafter of {path} takes hints, and would be another without them")
    layers = {found[1] for name in tensors if (found := _LAYER.search(name))}
    if len(layers) != drafter.config.num_layers:
        raise ConfigError(f"the drafter of {path} has another shape: {len(layers)} layers (--layers)")
    try:
        for name, parameter in drafter.named_parameters():
            stored = f"parameter.{name}" if run else name
            if not name.startswith("hints.") or stored in tensors:  # a drafter without hints may learn to take them
                parameter.copy_(tensors[stored])
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"the drafter of {path} has another shape: {error}") from error
    if not run and drafter.config.fc_bias:
        weight, bias = standardisation.unfold(drafter.fc.weight, drafter.fc.bias)
        drafter.fc.weight.copy_(weight)
        drafter.fc.bias.copy_(bias)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file.parent} has no drafter to begin with: {error}") from error
