"""Trains a DSpark drafter on captured target states (DSpark §3.3), in one process or several that average gradients.

Single-threaded processes share cores better than threads of one: a thread that waits for its turn holds up every
parallel region, a process only the end of a step. Leaves data to `training.features` and the start to
`training.initialise`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributed

from dspark.models.drafters import DSparkDrafter
from training.blocks import block_rows, sample_anchors
from training.features import Batch, Sequences, gather
from training.losses import LossParts, block_loss, position_weights
from training.state import Progress


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train. The run is over after `steps`, or after `seconds` of training where that is given.

    A step takes `sequences` sequences in each process and `anchors` blocks in each of them.
    """

    steps: int = 4000
    seconds: float | None = None
    sequences: int = 4
    anchors: int = 32
    learning_rate: float = 2e-3
    warmup: float = 0.04
    clip: float = 1.0
    decay: float = 4.0
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step's figures, averaged over processes; `acceptance` is 1 - TV by block position."""

    step: int
    seconds: float
    learning_rate: float
    loss: float
    cross_entropy: float
    distance: float
    confidence: float
    gradient_norm: float
    acceptance: list[float]


class Exchange(Protocol):
    """How processes agree: this one's number, how many there are, and the mean over all of them."""

    rank: int
    world: int

    def mean_(self, vector: Tensor) -> None:
        """Replace `vector` by its mean over processes."""


class Alone:
    """One process."""

    rank: int = 0
    world: int = 1

    def mean_(self, vector: Tensor) -> None:
        """Nothing to do."""


class Gloo:
    """Processes joined by torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    def mean_(self, vector: Tensor) -> None:
        """Averages over processes."""
        distributed.all_reduce(vector)
        vector.div_(self.world)


class Trainer:
    """One process's part of a training run."""

    def __init__(
        self,
        drafter: DSparkDrafter,
        sequences: Sequences,
        settings: TrainSettings,
        *,
        exchange: Exchange | None = None,
    ) -> None:
        self.drafter = drafter
        self.sequences = sequences
        self.settings = settings
        self.exchange: Exchange = exchange or Alone()
        self.parameters = [p for p in drafter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.progress = Progress()
        self._weights = position_weights(drafter.config.block_size, settings.decay)

    @property
    def fraction(self) -> float:
        """How much of the run is done, 0 … 1."""
        if self.settings.seconds is not None:
            return min(1.0, self.progress.seconds / self.settings.seconds)
        return min(1.0, self.progress.step / self.settings.steps)

    def run(self, report: Callable[[StepReport], None]) -> None:
        """Steps until the run is over; `report` after each."""
        while self.fraction < 1:
            report(self.step())

    def step(self) -> StepReport:
        """One optimiser step. Processes agree on the time too, so that all have the same learning rate."""
        started = time.monotonic()
        rate = learning_rate(self.settings, self.fraction)
        batch, anchors = self._draw()
        parts = self._backward(batch, anchors)
        figures = torch.stack([parts.total.detach(), parts.cross_entropy, parts.distance, parts.confidence])
        shared = torch.cat([figures, self._by_position(parts), torch.zeros(1)])
        norm = self._update(rate)
        shared[-1] = time.monotonic() - started
        self.exchange.mean_(shared)
        self.progress.step += 1
        self.progress.seconds += float(shared[-1])
        loss, cross_entropy, distance, confidence, *acceptance = shared[:-1].tolist()
        return StepReport(
            self.progress.step, self.progress.seconds, rate, loss, cross_entropy, distance, confidence, norm, acceptance
        )

    def _draw(self) -> tuple[Batch, Tensor]:
        """Sequences and anchors of this step and process, from the seed alone."""
        seed = (self.settings.seed << 40) + self.progress.step * self.exchange.world + self.exchange.rank
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.sequences), (self.settings.sequences,), generator=generator)
        batch = gather(self.sequences, rows)
        return batch, sample_anchors(batch, self.settings.anchors, generator)

    def _backward(self, batch: Batch, anchors: Tensor) -> LossParts:
        with torch.autocast("cpu", torch.bfloat16):
            rows = block_rows(self.drafter, batch, anchors)
        weights = rows.valid * self._weights
        parts = block_loss(
            rows.logits.flatten(0, 2), rows.confidence.flatten(), rows.target.flatten(0, 2), rows.labels.flatten(),
            weights.flatten(),
        )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        parts.total.backward()  # type: ignore[no-untyped-call]
        return parts

    def _by_position(self, parts: LossParts) -> Tensor:
        return parts.acceptance.view(-1, self.drafter.config.block_size).mean(0)

    def _update(self, rate: float) -> float:
        """Average the gradients over processes, clip, step; the norm before clipping."""
        if self.exchange.world > 1:
            flat = torch.cat([_grad(p).flatten() for p in self.parameters])
            self.exchange.mean_(flat)
            for parameter, grad in zip(
                self.parameters, torch.split(flat, [p.numel() for p in self.parameters]), strict=True
            ):
                parameter.grad = grad.view_as(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(norm)


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def learning_rate(settings: TrainSettings, fraction: float) -> float:
    """Linear warm-up over the first part of a run, then half a cosine down to a fiftieth."""
    if fraction < settings.warmup:
        return settings.learning_rate * max(fraction / settings.warmup, 0.02)
    rest = (fraction - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * rest)))
