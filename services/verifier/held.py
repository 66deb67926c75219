"""Hidden states of committed rows until their features are computed: after the step, or when somebody wants them.

While a sequence is not drafted for, its features would only take the cores from the steps. Whose may wait is the
routers' decision, whose time has come the engine's, and who gets them the feed's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        placed = [(rows.end - rows.first, state.cached.full_pages, rows.start) for state, rows in taken]
        self._features.write(_gathered([rows for _, rows in taken]), placed)


def _gathered(taken: Sequence[_Rows]) -> Mapping[int, Tensor]:
    """Their states, one after another; of one sequence, where they lie."""
    if len(taken) == 1:
        part, first, end, _ = taken[0]
        return {layer: states[first:end] for layer, states in part.captured.items()}
    by_part: dict[Computed, list[int]] = {}
    for part, first, end, _ in taken:
        by_part.setdefault(part, []).extend(range(first, end))
    layers = taken[0].part.captured
    device = next(iter(layers.values())).device
    rows = [(part.captured, torch.tensor(own, device=device)) for part, own in by_part.items()]
    return {layer: torch.cat([captured[layer].index_select(0, own) for captured, own in rows]) for layer in layers}


def _size(part: Computed) -> int:
    return sum(states.nbytes for states in part.captured.values())
