"""A step's forward and backward as one launch on a card.

A drafter is small: a step of it is some thousand kernels of a few microseconds each, and launching them one by one
takes several times as long as running them. Recorded once as a CUDA graph for each shape, they are launched together;
so batches should have few shapes. Leaves what a step computes to `training.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from training.states import Batch

__all__ = ["Ahead", "Drawn", "Graphed"]

_WARM_UPS = 3

Drawn = tuple[Batch, Tensor, int]
"""A step's texts, the anchors of its blocks, and their length."""

Work = Callable[[Batch, Tensor, int], Tensor]
"""Adds a batch's gradients to the parameters', and gives the step's figures."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    anchors: Tensor
    figures: Tensor


class Ahead:
    """Gathers a step's texts on a stream of their own while the card computes the step before.

    What has to travel to the card waits for nothing but what travels with it, then.
    """

    def __init__(self, device: torch.device, draw: Callable[[int], Drawn]) -> None:
        self._draw = draw
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._step = -1
        self._drawn: Drawn | None = None

    def take(self, step: int) -> Drawn:
        """A step's, drawn now where it was not before; its memory stays until the next is drawn and taken."""
        if self._drawn is None or self._step != step:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))  # what came before the first step
            self.draw(step)
        assert self._drawn is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # who draws next may reuse what was read
        return self._drawn

    def draw(self, step: int) -> None:
        """Begin on a step's; whatever the caller's stream does next waits for it, but not what it does already."""
        with torch.cuda.stream(self._stream):
            self._step, self._drawn = step, self._draw(step)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Graphed:
    """`work` with gradients that begin at zero, recorded at the first call with each block length and shape.

    Gradients keep their places: who changes them does so in place.
    """

    def __init__(self, work: Work, parameters: Sequence[Tensor]) -> None:
        self._work = work
        self._parameters = parameters
        self._gradients: list[Tensor] = []
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch, anchors: Tensor, length: int) -> Tensor:
        """The figures; they are overwritten by the next call, and so are the gradients."""
        key = (length, *batch.captured.shape, *anchors.shape)
        if key not in self._recorded:
            self._recorded[key] = self._record(batch, anchors, length)
        recorded = self._recorded[key]
        for held, given in zip(_tensors(recorded.batch), _tensors(batch), strict=True):
            held.copy_(given)
        recorded.anchors.copy_(anchors)
        recorded.graph.replay()
        return recorded.figures

    def _record(self, batch: Batch, anchors: Tensor, length: int) -> _Recorded:
        if not self._gradients:  # one place for all graphs
            self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                self._work(batch, anchors, length)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that watch over several processes, go on as they like.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            torch._foreach_zero_(self._gradients)
            figures = self._work(batch, anchors, length)
        return _Recorded(graph, batch, anchors, figures)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is not None:
            yield from (value,) if isinstance(value, Tensor) else value
