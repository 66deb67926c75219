"""What a run leaves behind: a JSON log, TensorBoard scalars, saves to go on from, and the finished checkpoint."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from dspark.models.drafters import Drafter, save_drafter
from training.initialise import Standardisation, fold_for_serving
from training.plan import RunPlan
from training.state import save_state
from training.trainer import StepReport, Trainer
from training.validate import Validation

__all__ = ["Recorder"]

LOGGED_EVERY = 20


class Recorder:
    """Log, scalars, validations and saves around a trainer; nothing in processes but the first."""

    def __init__(
        self, plan: RunPlan, trainer: Trainer, judge: Callable[[Drafter], Validation], standardisation: Standardisation
    ) -> None:
        self._plan, self._trainer, self._judge, self._standardisation = plan, trainer, judge, standardisation
        self._first = trainer.exchange.rank == 0
        self._scalars = _scalars(plan.run) if self._first else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scalars is not None:
            self._scalars.close()

    def stepped(self, step: StepReport) -> None:
        """After every step."""
        if step.step % LOGGED_EVERY == 0:
            self._log("step", step.step, asdict(step))
        if step.step % self._plan.validate_every == 0 and not self._trainer.finished:
            self._validate()
        if step.step % self._plan.save_every == 0 and not self._trainer.finished:
            self._save()

    def finish(self) -> Validation:
        """Save, validate, and write the checkpoint."""
        self._save()
        validation = self._validate()
        if self._first:
            save_drafter(fold_for_serving(self._trainer.drafter, self._standardisation), self._plan.out)
        return validation

    def _save(self) -> None:
        if self._first:
            trainer = self._trainer
            save_state(self._plan.run, trainer.drafter, trainer.optimizer, trainer.progress)

    def _validate(self) -> Validation:
        validation = self._judge(self._trainer.drafter)
        self._log("validation", self._trainer.progress.step, asdict(validation))
        return validation

    def _log(self, event: str, step: int, figures: dict[str, Any]) -> None:
        if not self._first:
            return
        with (self._plan.run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"time": round(time.time(), 1), "event": event, **figures, "step": step}) + os.linesep)
        if self._scalars is not None:
            for label, number in _flat(event, figures):
                self._scalars.add_scalar(label, number, step)


def _flat(event: str, figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """One number a label; lists are numbered from 1."""
    for name, value in figures.items():
        if isinstance(value, list):
            yield from ((f"{event}/{name}/{place}", number) for place, number in enumerate(value, 1))
        else:
            yield f"{event}/{name}", value


def _scalars(run: Path) -> Any:
    """A TensorBoard writer, where there is a TensorBoard that loads: it may want another protobuf than is here."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
    except Exception:  # noqa: BLE001  # the log has everything that it would show
        return None
    return SummaryWriter(str(run / "tensorboard"))
