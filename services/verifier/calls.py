"""Calls that wait for the engine, and which of them run together. Knows their order and rows, not what they do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from dspark.messages import StepItem
from services.verifier.company import Load

__all__ = ["Call", "Waiting", "load_of"]


def _nothing() -> None:
    """The function of a call that is a step."""


@dataclass(slots=True, eq=False)
class Call:
    """A queued call: a function, or the items of a step and whose they are."""

    function: Callable[[], Any] = _nothing
    items: tuple[StepItem, ...] | None = None
    caller: object = None
    answer: Future[Any] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.perf_counter)
    delayed: float = 0.0  # seconds that it waited for calls that are no steps
    rows: int = field(init=False)
    sequences: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Asked for at every look at the queue, so computed once."""
        self.rows = sum(item.rows for item in self.items or ())
        self.sequences = frozenset(item.key.sequence_id for item in self.items or ())

    @property
    def load(self) -> Load:
        """Rows and mean committed length."""
        items = self.items or ()
        return self.rows, sum(item.committed_len for item in items) / max(1, len(items))


class Waiting:
    """Calls in the order in which they came. Whoever uses it sees to it that nobody else does."""

    def __init__(self, max_rows: int) -> None:
        """`max_rows`: of steps that run as one."""
        self._max_rows = max_rows
        self._calls: deque[Call] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        return iter(self._calls)

    def add(self, call: Call) -> None:
        """It comes last."""
        self._calls.append(call)

    def take(self, calls: Iterable[Call]) -> None:
        """These wait no more."""
        for call in calls:
            self._calls.remove(call)

    @property
    def first(self) -> Call:
        """It has waited longest."""
        return self._calls[0]

    @property
    def function(self) -> Call | None:
        """The first that is no step."""
        return next((call for call in self._calls if call.items is None), None)

    @property
    def steps(self) -> list[Call]:
        """All that are."""
        return [call for call in self._calls if call.items is not None]

    def group(self) -> list[Call]:
        """The first step and those behind it that run together with it, up to one that does not fit."""
        taken: list[Call] = []
        for call in self.steps:
            if taken and not self._joins(taken, call):
                break
            taken.append(call)
        return taken

    def within(self, group: Sequence[Call]) -> Call | None:
        """The first call, no step, that one of the group came after: it runs before them."""
        for call in self._calls:
            if call is group[-1]:
                return None
            if call.items is None:
                return call
        return None

    def _joins(self, taken: Sequence[Call], other: Call) -> bool:
        """Whether a step fits into one forward with those taken: no sequence twice, not too many rows."""
        fits = other.rows + sum(call.rows for call in taken) <= self._max_rows
        return fits and all(other.sequences.isdisjoint(call.sequences) for call in taken)


def load_of(calls: Sequence[Call]) -> Load:
    """What these are as one step."""
    rows = sum(call.rows for call in calls)
    return rows, sum(call.rows * call.load[1] for call in calls) / max(1, rows)
