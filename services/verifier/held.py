"""Hidden states of committed rows until their features are computed: after the step, or when somebody wants them.

While a sequence is not drafted for, its features would only take the cores from the steps. Whose may wait is the
routers' decision, whose time has come the engine's, and who gets them the feed's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.verifier.features import FeatureStore
from services.verifier.sequences import SequenceState
from services.verifier.step import Computed, first_rows

__all__ = ["HeldStates"]


class _Rows(NamedTuple):
    """Of one sequence in one forward, the first and the one after the last; and the position of the first."""

    part: Computed
    first: int
    end: int
    start: int


class HeldStates:
    """What forwards have captured and no feature was computed of yet. For the engine's thread."""

    def __init__(self, features: FeatureStore, *, limit_bytes: int) -> None:
        """`limit_bytes`: of states that may wait."""
        self._features = features
        self._limit = limit_bytes
        self._rows: dict[SequenceState, list[_Rows]] = {}
        self._uses: Counter[Computed] = Counter()  # a forward's states are there until its last rows are let go
        self._bytes = 0

    @property
    def states(self) -> list[SequenceState]:
        """Sequences that have rows here."""
        return list(self._rows)

    @property
    def full(self) -> bool:
        """Whether nothing more should wait."""
        return self._bytes > self._limit

    def add(self, part: Computed) -> None:
        """A forward that was just done: all rows of an item but its rejected drafts, where drafts may be wanted.

        How far an item got is in its verdict, for its sequence may be further by now.
        """
        if not part.captured:
            return
        for (own, first), verdict in zip(first_rows(part.work), part.verdicts, strict=True):
            if own.state.request.features:
                rows = _Rows(part, first, first + verdict.computed_len - own.start, own.start)
                self._rows.setdefault(own.state, []).append(rows)
                self._uses[part] += 1
        self._bytes += _size(part) if self._uses[part] else 0

    def keep(self, states: Iterable[SequenceState]) -> None:
        """Compute and store the features of these sequences' rows."""
        taken = [(state, rows) for state in states for rows in self._take(state)]
        if taken:
            self._write(taken)

    def drop(self, states: Iterable[SequenceState]) -> None:
        """Let these sequences' rows go."""
        for state in states:
            self._take(state)

    def _take(self, state: SequenceState) -> list[_Rows]:
        taken = self._rows.pop(state, [])
        for rows in taken:
            self._uses[rows.part] -= 1
            if not self._uses[rows.part]:
                del self._uses[rows.part]
                self._bytes -= _size(rows.part)
        return taken

    @torch.inference_mode()
    def _write(self, taken: Sequence[tuple[SequenceState, _Rows]]) -> None:
        taken = sorted(taken, key=lambda entry: id(entry[1].part))
        placed, at = [], 0
        for state, rows in taken:
            placed.append((torch.arange(at, at := at + rows.end - rows.first), state.cached.full_pages, rows.start))
        self._features.write(_gathered([rows for _, rows in taken]), placed)


def _gathered(taken: Sequence[_Rows]) -> Mapping[int, Tensor]:
    """Their states, one after another."""
    by_part: dict[Computed, list[Tensor]] = {}
    for part, first, end, _ in taken:
        by_part.setdefault(part, []).append(torch.arange(first, end))
    rows = [(part.captured, torch.cat(own)) for part, own in by_part.items()]
    layers = rows[0][0]
    return {
        layer: torch.cat([captured[layer][own.to(some.device)] for captured, own in rows])
        for layer, some in layers.items()
    }


def _size(part: Computed) -> int:
    return sum(states.nbytes for states in part.captured.values())
