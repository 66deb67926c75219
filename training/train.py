"""`python -m training.train`: train a drafter from feature shards, or go on with a run that was stopped."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import distributed
from torch.multiprocessing.spawn import start_processes

from dspark.models.config import TargetConfig, parse_config, read_config
from dspark.models.drafters import DSparkDrafter, save_drafter
from dspark.models.drafters.checkpoint import target_tensors
from dspark.models.gguf import GgufSource
from dspark.models.weights import SafetensorsSource, TensorSource
from training.blocks import block_rows, sample_anchors
from training.features import Sequences, Standardisation, gather, measure, read_shards, shard_files
from training.initialise import (
    Shape,
    absorb_post_norms,
    draft_vocabulary,
    drafter_config,
    fold_for_serving,
    start_from_target,
)
from training.state import load_setup, load_state, save_setup, save_state
from training.trainer import Alone, Exchange, Gloo, StepReport, Trainer, TrainSettings
from training.validate import Validation, tally

HELD_OUT_EVERY = 40


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What and where: target (directory or .gguf), feature shards, the run's own directory, the finished checkpoint."""

    target: Path
    data: Path
    run: Path
    out: Path
    name: str
    processes: int
    save_seconds: float
    settings: TrainSettings
    shape: Shape


@dataclass(frozen=True, slots=True)
class Start:
    """A drafter at its start, this process's training and held-out sequences, and their standardisation."""

    drafter: DSparkDrafter
    training: Sequences
    held_out: Sequences
    standardisation: Standardisation


def main() -> None:
    """Start the processes of a run and wait for them."""
    plan = _arguments()
    plan.run.mkdir(parents=True, exist_ok=True)
    if plan.processes == 1:
        work(plan, Alone())
        return
    with tempfile.TemporaryDirectory() as meeting:
        start_processes(_joined, (plan, f"file://{meeting}/rendezvous"), nprocs=plan.processes)  # type: ignore[no-untyped-call]


def _arguments() -> RunPlan:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="target model: directory or .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="directory of feature shards")
    parser.add_argument("--run", type=Path, required=True, help="where state and log go; a run found there goes on")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes, at every save")
    parser.add_argument("--name", default="drafter", help="the drafter's name")
    parser.add_argument("--minutes", type=float, default=None, help="training time, over all continuations")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps, where no time is given")
    parser.add_argument("--processes", type=int, default=1, help="single-threaded processes that share each step")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seconds = None if given.minutes is None else 60 * given.minutes
    settings = TrainSettings(steps=given.steps, seconds=seconds, seed=given.seed)
    return RunPlan(
        given.target, given.data, given.run, given.out, given.name, given.processes, 180.0, settings, Shape()
    )


def _joined(rank: int, plan: RunPlan, meeting: str) -> None:
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=plan.processes)
    try:
        work(plan, Gloo())
    finally:
        distributed.destroy_process_group()


def work(plan: RunPlan, exchange: Exchange) -> None:
    """One process's whole part: prepare, go on from where the run is, train, save."""
    torch.set_num_threads(1)
    with open_target(plan.target) as (source, target):
        start = prepare(plan, source, target, exchange)
    trainer = Trainer(start.drafter, start.training, plan.settings, exchange=exchange)
    trainer.progress = load_state(plan.run, start.drafter, trainer.optimizer)
    with _Session(plan, trainer, start) as session:
        trainer.run(session.report)
        session.save()


@contextmanager
def open_target(path: Path) -> Iterator[tuple[TensorSource, TargetConfig]]:
    """A target's tensors and config, from a Hugging Face directory or a .gguf file."""
    if path.is_file():
        gguf = GgufSource(path)
        yield gguf, parse_config(gguf.config, source=str(path))
        return
    with SafetensorsSource(path) as source:
        yield source, read_config(path)


def prepare(plan: RunPlan, source: TensorSource, target: TargetConfig, exchange: Exchange) -> Start:
    """Read this process's shards and make the drafter; the first process decides what the run keeps to."""
    torch.manual_seed(plan.settings.seed)
    config = drafter_config(target, plan.shape, name=plan.name)
    shards = shard_files(plan.data)
    sequences = read_shards(shards[exchange.rank :: exchange.world], config)
    embed, head = target_tensors(plan.target, target.vocab_size, target.hidden_size, torch.bfloat16)
    if exchange.rank == 0 and not (plan.run / "setup.safetensors").exists():
        training, _ = sequences.split(HELD_OUT_EVERY)
        d2t = draft_vocabulary(training, head, plan.shape.draft_vocab_size, keep=target.eos_token_ids)
        save_setup(plan.run, d2t, measure(sequences.captured))
    if exchange.world > 1:
        distributed.barrier()
    d2t, standardisation = load_setup(plan.run)
    standardisation.apply_(sequences.captured)
    training, held_out = sequences.split(HELD_OUT_EVERY)
    drafter = DSparkDrafter(config, embed_weight=embed, head_weight=head[torch.arange(len(d2t)) + d2t], d2t=d2t)
    start_from_target(drafter, source, target, standardisation)
    absorb_post_norms(drafter, source, target, lambda: _first_rows(drafter, training))
    if exchange.world > 1:  # each saw its own sequences
        for parameter in drafter.parameters():
            exchange.mean_(parameter.data)
    return Start(drafter, training, held_out, standardisation)


def _first_rows(drafter: DSparkDrafter, training: Sequences) -> None:
    batch = gather(training, torch.arange(min(8, len(training))))
    with torch.autocast("cpu", torch.bfloat16):
        block_rows(drafter, batch, sample_anchors(batch, 16, torch.Generator().manual_seed(0)))


class _Session:
    """Log, progress bar, validation and saves around a trainer; only the first process writes."""

    def __init__(self, plan: RunPlan, trainer: Trainer, start: Start) -> None:
        self.plan, self.trainer, self.start = plan, trainer, start
        self.first = trainer.exchange.rank == 0
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar: Progress | nullcontext[None] = Progress(*columns) if self.first else nullcontext()
        self.task: TaskID | None = None
        self.saved_at = trainer.progress.seconds

    def __enter__(self) -> Self:
        self.bar.__enter__()
        if isinstance(self.bar, Progress):
            self.task = self.bar.add_task("training", total=1.0)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.__exit__(None, None, None)

    def report(self, step: StepReport) -> None:
        """After every step; all processes save at the same one, since they agree on the time."""
        if isinstance(self.bar, Progress) and self.task is not None:
            tau = 1 + _survival(step.acceptance)
            self.bar.update(self.task, completed=self.trainer.fraction, description=f"step {step.step} τ≈{tau:.2f}")
        if step.step % 20 == 0:
            self._log({"event": "step", **asdict(step)})
        if step.seconds - self.saved_at >= self.plan.save_seconds:
            self.save()

    def save(self) -> None:
        """Validate, then write state and checkpoint."""
        self.saved_at = self.trainer.progress.seconds
        validation = self._validate()
        self._log({"event": "validation", "step": self.trainer.progress.step, **asdict(validation)})
        if self.first:
            save_state(self.plan.run, self.trainer.drafter, self.trainer.optimizer, self.trainer.progress)
            save_drafter(fold_for_serving(self.trainer.drafter, self.start.standardisation), self.plan.out)

    def _validate(self) -> Validation:
        counts = tally(self.trainer.drafter, self.start.held_out)
        self.trainer.exchange.mean_(counts.values)
        counts.values *= self.trainer.exchange.world
        return counts.result()

    def _log(self, record: dict[str, object]) -> None:
        if self.first:
            with (self.plan.run / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"time": round(time.time(), 1), **record}) + os.linesep)


def _survival(acceptance: list[float]) -> float:
    total, alive = 0.0, 1.0
    for value in acceptance:
        alive *= value
        total += alive
    return total


if __name__ == "__main__":
    main()
