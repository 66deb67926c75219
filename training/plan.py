"""What a training run is: its settings, where everything lies, and that it stays the same when it is gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError
from dspark.files import write_json
from training.dataset import Manifest
from training.initialise import Shape
from training.trainer import TrainSettings

__all__ = ["RunPlan", "claim"]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What and where: target (directory or .gguf), data sets, the run's own directory, the finished checkpoint.

    `cache` (by default a place in each data set) holds at most `cache_gb` of the target's states in all; runs over the
    same data may share it. On a card they are in its memory instead, at most half of what is free. `save_every` and
    `validate_every` are in steps. Without `warm_start` layers begin at random;
    with `begin_with` the drafter begins as another run's ended or as a finished checkpoint, over its draft vocabulary.
    """

    target: Path
    data: tuple[Path, ...]
    run: Path
    out: Path
    name: str
    settings: TrainSettings
    shape: Shape
    cache: Path | None = None
    cache_gb: float = 8.0
    save_every: int = 500
    validate_every: int = 1000
    warm_start: bool = True
    begin_with: Path | None = None
    device: str = "cpu"

    def cache_of(self, number: int) -> Path:
        """Where the states of data set `number` are kept."""
        return self.data[number] / "states" if self.cache is None else self.cache / str(number)

    def identity(self, manifests: Sequence[Manifest]) -> dict[str, Any]:
        """What must be the same when a run is gone on with."""
        shape = asdict(self.shape)
        if not self.shape.hint_lengths:  # as in the plans of runs that were begun before there were any
            del shape["hint_lengths"]
        settings = asdict(self.settings)
        del settings["compile"]  # changes how fast a step is, and differs between devices
        facts = {"settings": settings, "shape": shape, "warm_start": self.warm_start}
        if self.begin_with is not None:
            facts["begin_with"] = str(self.begin_with)
        return dict(json.loads(json.dumps({**facts, "data": [manifest.identity for manifest in manifests]})))


def claim(plan: RunPlan, manifests: Sequence[Manifest]) -> None:
    """Begin a run's directory, or make sure that this very run began it; else `ConfigError`."""
    plan.run.mkdir(parents=True, exist_ok=True)
    path, facts = plan.run / "plan.json", plan.identity(manifests)
    if not path.exists():
        write_json(path, facts)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    found.get("settings", {}).pop("compile", None)  # in plans of earlier versions
    differing = sorted(key for key in facts.keys() | found.keys() if found.get(key) != facts.get(key))
    if differing:
        raise ConfigError(f"{plan.run} was begun with other {', '.join(differing)}; choose an empty run directory")
