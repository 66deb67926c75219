"""Hidden states of committed rows until their features are computed: after the step, or when somebody wants them.

While a sequence is not drafted for, its features would only take the cores from the steps. Whose may wait is the
routers' decision, whose time has come the engine's, and who gets them the feed's. States of closed sequences stay as
long as there is room: whoever goes on with their pages would otherwise pay a forward for their features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from services.verifier.features import FeatureStore
from services.verifier.sequences import SequenceState
from services.verifier.step import Computed, first_rows

__all__ = ["HeldStates"]

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Part:
    """What a forward has captured; it is there until its last rows are let go."""

    captured: Mapping[int, Tensor]
    size: int  # bytes
    uses: int = 0


class _Rows(NamedTuple):
    """Of one sequence in one forward, the first and the one after the last; and the position of the first."""

    part: _Part
    first: int
    end: int
    start: int

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.end - self.first

    def between(self, start: int, stop: int) -> _Rows:
        """Those at the positions from `start` to before `stop`, which it has some of."""
        first = self.first + max(0, start - self.start)
        return _Rows(self.part, first, self.end - max(0, self.stop - stop), max(start, self.start))


class HeldStates:
    """What forwards have captured and no feature was computed of yet. For the engine's thread.

    A sequence's rows are in the order of their positions, without a gap.
    """

    def __init__(self, features: FeatureStore, *, limit_bytes: int, generation: Callable[[int], int]) -> None:
        """`limit_bytes`: of states that may wait; `generation`: changes when a page is given other contents."""
        self._features = features
        self._limit = limit_bytes
        self._generation = generation
        self._rows: dict[SequenceState, list[_Rows]] = {}
        self._closed: dict[SequenceState, list[int]] = {}  # oldest first, with the generations of its rows' pages
        self._bytes = 0

    @property
    def states(self) -> list[SequenceState]:
        """Sequences that have rows here, closed ones among them."""
        return list(self._rows)

    @property
    def full(self) -> bool:
        """Whether nothing more should wait."""
        return self._bytes > self._limit

    def having(self, pages: Collection[int]) -> list[SequenceState]:
        """Those of which rows lie in one of these pages."""
        wanted = set(pages)
        return [state for state in self._rows if not wanted.isdisjoint(self._pages(state))] if wanted else []

    def add(self, computed: Computed) -> None:
        """A forward that was just done: all rows of an item but what was rejected, where drafts may be wanted."""
        if not computed.captured:
            return
        part = _Part(computed.captured, sum(states.nbytes for states in computed.captured.values()))
        for (own, first), verdict in zip(first_rows(computed.work), computed.verdicts, strict=True):
            count = verdict.computed_len - own.start - verdict.turned  # none where nothing came of the item
            if own.state.request.features and count > 0:
                kept = [_Rows(part, first, first + count, own.start)]
                if verdict.turned:
                    row = first + own.alternative(verdict.accepted + 1)[0]
                    kept.append(_Rows(part, row, row + 1, own.start + count))
                self._rows.setdefault(own.state, []).extend(kept)
                part.uses += len(kept)
        self._bytes += part.size if part.uses else 0

    def keep(self, states: Iterable[SequenceState]) -> None:
        """Compute and store the features of these sequences' rows.

        A fault in it is nothing to the call that comes upon these rows: they then lack features like any others, and
        whoever asks for them has them recomputed.
        """
        own = [state for state in states if state in self._rows]
        taken = [(state, rows) for state in own for rows in self._valid(state)]
        self.drop(own)
        if not taken:
            return
        try:
            self._write(taken)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("features not computed", sequences=len({state.key for state, _ in taken}))

    def retire(self, states: Iterable[SequenceState]) -> None:
        """These sequences are closed: what lies in whole pages may still be wanted. Their pages are theirs yet."""
        for state in states:
            self._cut(state, len(state.cached.keys) * state.cached.cache.page_size)
            if state in self._rows:
                self._closed[state] = [self._generation(page) for page in self._span(state)]

    def make_room(self) -> None:
        """Let closed sequences' rows go, oldest first, while more wait than may."""
        while self._closed and self.full:
            self.drop([next(iter(self._closed))])

    def drop_closed(self) -> None:
        """Let all rows of closed sequences go."""
        self.drop(list(self._closed))

    def drop(self, states: Iterable[SequenceState]) -> None:
        """Let these sequences' rows go."""
        for state in states:
            self._closed.pop(state, None)
            self._release(self._rows.pop(state, ()))

    def _cut(self, state: SequenceState, end: int) -> None:
        """Let the sequence's rows at positions from `end` on go."""
        rows = self._rows.pop(state, [])
        kept = [own.between(0, end) for own in rows if own.start < end]
        self._release(rows[len(kept) :])
        if kept:
            self._rows[state] = kept

    def _release(self, rows: Iterable[_Rows]) -> None:
        for part, *_ in rows:
            part.uses -= 1
            self._bytes -= 0 if part.uses else part.size

    def _span(self, state: SequenceState) -> Sequence[int]:
        """The pages that its rows lie in, as they are numbered now."""
        rows, size = self._rows[state], state.cached.cache.page_size
        return state.cached.full_pages[rows[0].start // size : -(-rows[-1].stop // size)]

    def _pages(self, state: SequenceState) -> list[int]:
        """Those of them whose contents still are the sequence's."""
        span = self._span(state)
        if state not in self._closed:
            return list(span)
        known = zip(span, self._closed[state], strict=True)
        return [page for page, generation in known if self._generation(page) == generation]

    def _valid(self, state: SequenceState) -> Iterator[_Rows]:
        """The sequence's rows, but for what lies in pages that were given to others."""
        if state not in self._closed:
            yield from self._rows[state]
            return
        size, pages = state.cached.cache.page_size, set(self._pages(state))
        for rows in self._rows[state]:
            for index in range(rows.start // size, -(-rows.stop // size)):
                if state.cached.full_pages[index] in pages:
                    yield rows.between(index * size, (index + 1) * size)

    @torch.inference_mode()
    def _write(self, taken: Sequence[tuple[SequenceState, _Rows]]) -> None:
        self._features.write(_gathered([rows for _, rows in taken]), _placed(taken))


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
