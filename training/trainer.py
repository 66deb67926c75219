"""Trains a drafter of any architecture (DSpark §3.3), in one process or several that average gradients.

A step's texts and anchors follow from the seed and the step alone, and are shared out over the processes: however many
there are, they take the same steps, but that blocks cut by a text's end weigh within their own process. Leaves states
to `training.states` and the start to `training.initialise`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributed

from dspark.errors import ConfigError
from dspark.models.drafters import Drafter
from training.blocks import anchors_at, arithmetic_of, block_rows
from training.graphed import Ahead, Drawn, Graphed
from training.initialise import Standardisation
from training.losses import EAGER, block_loss, compiled, position_weights
from training.state import Progress
from training.states import Batch, TargetStates


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train: `blocks` in all, `sequences` · `anchors` of them a step, `accumulate` parts a step one by one.

    Small steps learn more from as many blocks: after 33,000 blocks of seven tokens, 128 a step gave 1.51 tokens a round
    on held-out texts and 256 a step 1.37, everything else equal. With `lengths` each step draws one of them and cuts
    its blocks to it; it takes more of them then, so that every step has as many rows.
    """

    blocks: int = 300_000
    sequences: int = 4
    anchors: int = 16
    accumulate: int = 1
    learning_rate: float = 1.5e-3
    warmup: float = 0.04
    clip: float = 1.0
    decay: float = 4.0
    weight_decay: float = 0.01
    seed: int = 0
    compile: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(1, self.blocks // (self.sequences * self.anchors))

    def check(self, world: int, block: int) -> None:
        """`ConfigError` unless a step's texts divide into processes and their parts, and `lengths` fit a block."""
        if not all(1 <= length <= block for length in self.lengths):
            raise ConfigError(f"lengths {self.lengths} do not lie between 1 and the block's {block}")
        if self.sequences % (world * self.accumulate):
            raise ConfigError(
                f"{self.sequences} sequences a step do not divide into {world} processes x {self.accumulate} parts"
            )


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

    def meet(self) -> None:
        """Wait until every process is here."""


class Alone:
    """One process."""

    rank: int = 0
    world: int = 1

    def mean_(self, vector: Tensor) -> None:
        """Nothing to do."""

    def meet(self) -> None:
        """Nobody to wait for."""


class Joined:
    """Processes joined by torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    def mean_(self, vector: Tensor) -> None:
        """Averages over processes."""
        distributed.all_reduce(vector)
        vector.div_(self.world)

    def meet(self) -> None:
        """Wait for the others."""
        distributed.barrier()


class Trainer:
    """One process's part of a training run over the texts at `rows`."""

    def __init__(
        self,
        drafter: Drafter,
        states: TargetStates,
        rows: Sequence[int],
        standardisation: Standardisation,
        settings: TrainSettings,
        *,
        exchange: Exchange | None = None,
    ) -> None:
        self.drafter = drafter
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
        self.states = states
        self._rows = rows
        self.standardisation = standardisation
        self._weights = position_weights(drafter.config.block_size, settings.decay, device=drafter.embed_weight.device)
        self._arithmetic = compiled() if settings.compile else EAGER
        graphed = drafter.embed_weight.device.type == "cuda" and settings.accumulate == 1
        self._graphed = Graphed(self._backward, self.parameters) if graphed else None
        self._ahead = Ahead(drafter.embed_weight.device, lambda step: next(self._draw(step))) if graphed else None
        self._width = states.longest if graphed else 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.settings.steps

    def step(self) -> StepReport:
        """One optimiser step. `ConfigError` where the loss is no number any more; nothing was updated then."""
        started = time.monotonic()
        rate = learning_rate(self.settings, self.progress.step / self.settings.steps)
        shared = self._gradients()
        self.exchange.mean_(shared)
        loss, cross_entropy, distance, confidence, *acceptance = shared.tolist()
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} at step {self.progress.step + 1}; begin again with a lower learning rate"
            )
        norm = self._update(rate)
        self.progress.step += 1
        self.progress.seconds += time.monotonic() - started
        return StepReport(
            self.progress.step, self.progress.seconds, rate, loss, cross_entropy, distance, confidence, norm, acceptance
        )

    def _gradients(self) -> Tensor:
        """Those of this step, left with the parameters; its figures, averaged over parts."""
        if self._graphed is not None and self._ahead is not None:
            figures = self._graphed(*self._ahead.take(self.progress.step))
            if self.progress.step + 1 < self.settings.steps:
                self._ahead.draw(self.progress.step + 1)
            return figures
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([self._backward(*drawn) for drawn in self._draw(self.progress.step)]).mean(0)

    def _draw(self, step: int) -> Iterator[Drawn]:
        """This process's texts, anchors and block length of a step, in `accumulate` parts."""
        settings, world = self.settings, self.exchange.world
        generator = torch.Generator().manual_seed(_seed(settings.seed, step))
        chosen = torch.randint(len(self._rows), (settings.sequences,), generator=generator).tolist()
        seeds = torch.randint(1 << 32, (settings.sequences,), generator=generator).tolist()
        length, anchors = self._cut(generator)
        mine = range(self.exchange.rank, settings.sequences, world)
        size = settings.sequences // (world * settings.accumulate)
        for first in range(0, len(mine), size):
            part = mine[first : first + size]
            batch = self.states.batch([self._rows[chosen[n]] for n in part], width=self._width)
            self.standardisation.apply_(batch.captured)
            # Anchors are drawn text by text, so that they do not depend on how the texts are shared out.
            yield batch, anchors_at(batch, _shares(anchors, [seeds[n] for n in part])), length

    def _cut(self, generator: torch.Generator) -> tuple[int, int]:
        """How long this step's blocks are, and how many of each text."""
        block, lengths = self.drafter.config.block_size, self.settings.lengths
        if not lengths:
            return block, self.settings.anchors
        length = lengths[int(torch.randint(len(lengths), (), generator=generator))]
        return length, self.settings.anchors * block // length

    def _backward(self, batch: Batch, anchors: Tensor, length: int) -> Tensor:
        """Add this part's gradients; its figures: loss, CE, L1, BCE, acceptance by position."""
        with arithmetic_of(self.drafter):
            rows = block_rows(self.drafter, batch, anchors, length)
        n = rows.valid.shape[-1]
        parts = block_loss(
            rows.logits.flatten(0, 2),
            None if rows.confidence is None else rows.confidence.flatten(),
            rows.target.flatten(0, 2),
            rows.labels.flatten(),
            (rows.valid * self._weights[:n]).flatten(),
            self._arithmetic,
        )
        (parts.total / self.settings.accumulate).backward()  # type: ignore[no-untyped-call]
        figures = torch.stack([parts.total.detach(), parts.cross_entropy, parts.distance, parts.confidence])
        valid = rows.valid.view(-1, n).float()
        acceptance = (parts.acceptance.view(-1, n) * valid).sum(0) / valid.sum(0).clamp_min(1)
        return torch.cat([figures, acceptance])

    def _update(self, rate: float) -> float:
        """Average the gradients over processes, clip, step; the norm before clipping."""
        if self.exchange.world > 1:
            flat = torch.cat([_grad(p).flatten() for p in self.parameters])
            self.exchange.mean_(flat)
            for parameter, grad in zip(
                self.parameters, torch.split(flat, [p.numel() for p in self.parameters]), strict=True
            ):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(grad.view_as(parameter))  # in its place: a recorded step writes there
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(norm)


def _seed(*parts: int) -> int:
    """One seed of several numbers: torch's generator looks at 32 bits of it only, so they cannot just be shifted."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def _shares(count: int, seeds: Sequence[int]) -> Tensor:
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def learning_rate(settings: TrainSettings, fraction: float) -> float:
    """Linear warm-up over the first part of a run, then half a cosine down to a fiftieth."""
    if fraction < settings.warmup:
        return settings.learning_rate * max(fraction / settings.warmup, 0.02)
    rest = (fraction - settings.warmup) / (1 - settings.warmup)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * rest)))
