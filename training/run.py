"""A training run from its plan to its checkpoint: prepares, goes on from where it was, trains, validates, saves."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import distributed

from dspark.errors import ConfigError
from training.beginning import check_beginning
from training.dataset import read_manifest, read_texts
from training.plan import RunPlan, claim
from training.prepare import open_target, prepare, split, target_states, with_blocks
from training.recorder import Recorder
from training.state import load_state
from training.trainer import Alone, Exchange, Joined, StepReport, Trainer
from training.validate import Validation, validate

__all__ = ["Outcome", "joined_processes", "own_device", "train"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its last step and validation, seconds of training, peak memory and cached states in bytes."""

    step: StepReport | None
    validation: Validation
    seconds: float
    peak_bytes: int
    cache_bytes: int
    texts_computed: int


def own_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Under `torchrun` each process of a machine has the card of its own number, unless `device` names one."""
    number = environment.get("LOCAL_RANK", "")
    return f"cuda:{number}" if device == "cuda" and number else device


@contextlib.contextmanager
def joined_processes(device: str) -> Iterator[Exchange]:
    """The processes that `torchrun` started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Joined()
    finally:
        distributed.destroy_process_group()


def train(plan: RunPlan, exchange: Exchange, report: Callable[[StepReport], None]) -> Outcome:
    """One process's whole part.

    Raises:
        ConfigError, Mismatch: what cannot be trained on, a disk that refuses, or a loss that is no number any more.
    """
    manifests, texts = [read_manifest(path) for path in plan.data], [read_texts(path) for path in plan.data]
    plan.settings.check(exchange.world, plan.shape.block_size)
    if plan.begin_with is not None:
        check_beginning(plan.begin_with)
    training, held_out = split(sum(map(len, texts)))
    states = target_states(plan, manifests, texts)
    training, held_out = with_blocks(training, states.texts), with_blocks(held_out, states.texts)
    if not training or not held_out:
        raise ConfigError("too few responses have a block to predict: more and longer ones are needed to train on")
    if exchange.rank == 0:  # nothing is written before all that can be checked has been
        claim(plan, manifests)
    exchange.meet()
    with open_target(plan.target) as (source, config):
        drafter, standardisation = prepare(plan, source, config, states, training, exchange)
    trainer = Trainer(drafter, states, training, standardisation, plan.settings, exchange=exchange)
    trainer.progress = load_state(plan.run, drafter, trainer.optimizer)
    left = (plan.settings.steps - trainer.progress.step) * plan.settings.sequences // exchange.world
    if left >= len(training):  # else few of them are needed
        states.fill([*held_out, *training])
    last = None
    with Recorder(plan, trainer, lambda d: validate(d, states, held_out, standardisation), standardisation) as recorder:
        while not trainer.finished:
            last = trainer.step()
            recorder.stepped(last)
            report(last)
        validation = recorder.finish()
    return Outcome(last, validation, trainer.progress.seconds, _peak_bytes(), states.cache_bytes, states.computed)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
