"""Hidden states of committed rows until their features are computed: after the step, or when somebody wants them.

While a sequence is not drafted for, its features would only take the cores from the steps. Whose may wait is the
routers' decision, whose time has come the engine's, and who gets them the feed's. States of closed sequences stay as
long as there is room: whoever goes on with their pages would otherwise pay a forward for their features.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from services.verifier.features import FeatureStore
from services.verifier.sequences import SequenceState
from services.verifier.step import Computed, first_rows

__all__ = ["HeldStates"]

_log = structlog.get_logger(__name__)


class _Rows(NamedTuple):
    """Of one sequence in one forward, the first and the one after the last; and the position of the first."""

    part: Computed
    first: int
    end: int
    start: int


class HeldStates:
    """What forwards have captured and no feature was computed of yet. For the engine's thread."""

    def __init__(self, features: FeatureStore, *, limit_bytes: int, generation: Callable[[int], int]) -> None:
        """`limit_bytes`: of states that may wait, half of it for closed sequences; `generation`: of a page in use."""
        self._features = features
        self._limit = limit_bytes
        self._generation = generation
        self._rows: dict[SequenceState, list[_Rows]] = {}
        self._closed: dict[SequenceState, list[int]] = {}  # oldest first, with the generations of their whole pages
        self._uses: Counter[Computed] = Counter()  # a forward's states are there until its last rows are let go
        self._bytes = 0

    @property
    def states(self) -> list[SequenceState]:
        """Sequences that have rows here, closed ones among them."""
        return list(self._rows)

    @property
    def full(self) -> bool:
        """Whether nothing more should wait."""
        return self._bytes > self._limit

    def add(self, part: Computed) -> None:
        """A forward that was just done: all rows of an item but what was rejected, where drafts may be wanted."""
        if not part.captured:
            return
        for (own, first), verdict in zip(first_rows(part.work), part.verdicts, strict=True):
            count = verdict.computed_len - own.start - verdict.turned  # none where nothing came of the item
            if own.state.request.features and count > 0:
                kept = [_Rows(part, first, first + count, own.start)]
                if verdict.turned:
                    row = first + own.alternative(verdict.accepted + 1)[0]
                    kept.append(_Rows(part, row, row + 1, own.start + count))
                self._rows.setdefault(own.state, []).extend(kept)
                self._uses[part] += len(kept)
        self._bytes += _size(part) if self._uses[part] else 0
        self._make_room()

    def keep(self, states: Iterable[SequenceState]) -> None:
        """Compute and store the features of these sequences' rows.

        A fault in it is nothing to the call that comes upon these rows: they then lack features like any others, and
        whoever asks for them has them recomputed.
        """
        taken = [(state, rows) for state in states for rows in self._take(state)]
        if not taken:
            return
        try:
            self._write(taken)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("features not computed", sequences=len({state.key for state, _ in taken}))

    def retire(self, states: Iterable[SequenceState]) -> None:
        """These sequences are closed: only what stays of them in whole pages may still be wanted, if it is not old."""
        for state in states:
            if state in self._rows:
                pages = state.cached.full_pages[: len(state.cached.keys)]
                self._closed[state] = [self._generation(page) for page in pages]
        self._make_room()

    def drop_retired(self) -> None:
        """Let the rows of closed sequences go."""
        self.drop(list(self._closed))

    def drop(self, states: Iterable[SequenceState]) -> None:
        """Let these sequences' rows go."""
        for state in states:
            self._take(state)

    def _make_room(self) -> None:
        while self._closed and self._bytes > self._limit // 2:
            self._take(next(iter(self._closed)))

    def _take(self, state: SequenceState) -> list[_Rows]:
        taken = self._rows.pop(state, [])
        for rows in taken:
            self._uses[rows.part] -= 1
            if not self._uses[rows.part]:
                del self._uses[rows.part]
                self._bytes -= _size(rows.part)
        generations = self._closed.pop(state, None)
        return taken if generations is None else list(_before(taken, self._shared_len(state, generations)))

    def _shared_len(self, state: SequenceState, generations: Sequence[int]) -> int:
        """Positions of a closed sequence whose pages nobody was given since."""
        pages = zip(state.cached.full_pages, generations, strict=False)
        kept = itertools.takewhile(lambda entry: self._generation(entry[0]) == entry[1], pages)
        return sum(1 for _ in kept) * state.cached.cache.page_size

    @torch.inference_mode()
    def _write(self, taken: Sequence[tuple[SequenceState, _Rows]]) -> None:
        self._features.write(_gathered([rows for _, rows in taken]), _placed(taken))


def _before(taken: Iterable[_Rows], end: int) -> Iterator[_Rows]:
    """What of it lies before a position."""
    for rows in taken:
        if rows.start < end:
            yield rows._replace(end=min(rows.end, rows.first + end - rows.start))


def _placed(taken: Iterable[tuple[SequenceState, _Rows]]) -> list[tuple[int, Sequence[int], int]]:
    """How many rows, of what pages, from which position on; rows that follow each other as one entry."""
    placed: list[tuple[int, Sequence[int], int]] = []
    before: SequenceState | None = None
    for state, rows in taken:
        count, pages, start = rows.end - rows.first, state.cached.full_pages, rows.start
        if state is before and sum(placed[-1][::2]) == start:
            before_count, _, start = placed.pop()
            count += before_count
        placed.append((count, pages, start))
        before = state
    return placed


def _gathered(taken: Sequence[_Rows]) -> Mapping[int, Tensor]:
    """Their states, one after another."""
    layers = taken[0].part.captured
    if len({rows.part for rows in taken}) > 1 or len(taken) == 1:
        return {
            layer: torch.cat([rows.part.captured[layer][rows.first : rows.end] for rows in taken]) for layer in layers
        }
    index = torch.tensor([row for rows in taken for row in range(rows.first, rows.end)])
    return {layer: states.index_select(0, index.to(states.device)) for layer, states in layers.items()}


def _size(part: Computed) -> int:
    return sum(states.nbytes for states in part.captured.values())
