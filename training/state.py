"""A training run's files: what was decided at its start, and where it got to.

All are safetensors and JSON, written whole or not at all. Batches are drawn from (seed, step), so the step is all
of the random state there is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dspark.errors import ConfigError
from dspark.models.drafters import Drafter
from dspark.models.weights import write_tensors
from training.initialise import Standardisation

SETUP_FILE = "setup.safetensors"
STATE_FILE = "state.safetensors"


@dataclass(slots=True)
class Progress:
    """Steps done, and seconds spent on them over all runs."""

    step: int = 0
    seconds: float = 0.0


def save_setup(run: Path, d2t: Tensor, standardisation: Standardisation) -> None:
    """Draft vocabulary and standardisation: fixed for the whole run, whatever data is added."""
    tensors = {"d2t": d2t, "mean": standardisation.mean, "deviation": standardisation.deviation}
    write_tensors(run / SETUP_FILE, {name: tensor.contiguous() for name, tensor in tensors.items()})


def load_setup(run: Path) -> tuple[Tensor, Standardisation]:
    """What `save_setup` wrote: d2t and standardisation."""
    try:
        tensors = load_file(run / SETUP_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{run} is no run to go on from: {error}") from error
    return tensors["d2t"], Standardisation(tensors["mean"], tensors["deviation"])


def save_state(run: Path, drafter: Drafter, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Everything that `load_state` needs to go on as if never stopped."""
    tensors = {}
    for name, parameter in drafter.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors[f"first.{name}"] = moments.get("exp_avg", torch.zeros_like(parameter)).detach()
        tensors[f"second.{name}"] = moments.get("exp_avg_sq", torch.zeros_like(parameter)).detach()
    facts = {"step": progress.step, "seconds": progress.seconds}
    write_tensors(run / STATE_FILE, tensors, {"progress": json.dumps(facts)})


def load_state(run: Path, drafter: Drafter, optimizer: torch.optim.AdamW) -> Progress:
    """Fill drafter and optimiser from a run's state; a fresh Progress where it has none."""
    path = run / STATE_FILE
    if not path.exists():
        return Progress()
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            parameter.copy_(tensors[f"parameter.{name}"])
            device = parameter.device
            optimizer.state[parameter] = {
                "step": torch.tensor(float(progress.step), device=device),
                "exp_avg": tensors[f"first.{name}"].to(device),
                "exp_avg_sq": tensors[f"second.{name}"].to(device),
            }
    return progress
