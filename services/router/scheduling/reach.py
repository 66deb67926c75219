"""How long the blocks are that are worth asking for: by what plans took of their places lately, and what these cost.

A drafter's sequential head runs once a token and its layers once a row, and what the plan cuts anyway was drafted for
nothing. Known before anything is drafted, so the same in either mode. Knows no requests and no clock.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from services.router.scheduling.plan import Bools, Floats, Ints

__all__ = ["Blocks", "Reach"]

FIRST = 8  # rounds of whole blocks; fewer than a router's first ones that draft in any case (`looks`)
WHOLE_EVERY = 64  # rounds, of which one asks for whole blocks: what lies behind a step in the costs shows there only
SETTLED_EVERY = 8  # rounds, after which the length is chosen anew
PACE = 1 / 16  # of averages, by round
SELDOM = 1 / 4  # of those of places that only whole blocks have
BETTER = 1.01  # times the tokens a second, for which a length is left
SEEN = 9  # drafts of a length that count
ENOUGH = 3  # of these: what is first of its kind takes longer
KEPT = 512  # rounds, after which what a length took is forgotten, so that it is tried again
ALIKE = 0.75  # of a batch's blocks, at least, are as long as the longest where its time tells what such blocks take
FORWARD = 0.6  # of a whole block's time, that a block of no tokens would take: presumed


class Blocks(NamedTuple):
    """What became of a round's blocks.

    Attributes:
        taken: (R, n) the survival of drafts that the plan took, 0 of all others.
        asked: (R,) draft tokens that were asked for.
        requests: that were drafted for together, these among them.
        drafting: seconds that the round waited for blocks.
        row: seconds that a draft's row took in the step.
        beside: seconds of the round beside drafting and drafts' rows.
        base: tokens of the round without drafts: more than `requests` where others wait for these.
    """

    taken: Floats
    asked: Ints
    requests: int
    drafting: float
    row: float
    beside: float
    base: float


@dataclass(slots=True)
class Reach:
    """Of one cohort's batches of one kind: whole blocks at first.

    What place k brings is what place k - 1 does, times a share that is followed in blocks that were asked that far: so
    shorter blocks do not hide what longer ones would bring as the text gets easier.
    """

    length: int | None = None
    _taken: Floats = field(default_factory=lambda: np.zeros(0))  # a block's tokens at each place, where plans take it
    _before: Floats = field(default_factory=lambda: np.zeros(0))  # and at the place before it, of the same blocks
    _rows: Floats = field(default_factory=lambda: np.zeros(0))  # of these, how many have a row there
    _row: float = 0.0
    _beside: float = 0.0
    _base: float = 0.0
    _drafting: dict[tuple[int, int], deque[tuple[int, float]]] = field(default_factory=dict)
    _rounds: int = 0
    _shortened: int = 0

    def usual(self, block: int) -> int:
        """Draft tokens asked for of a block, but in a round of whole ones."""
        return block if self.length is None else min(block, self.length)

    def next(self, block: int) -> int:
        """Draft tokens to ask for in the next round."""
        return self.usual(block) if self._shortened < WHOLE_EVERY else block

    def observe(self, blocks: Blocks) -> None:
        """Takes in a round, and chooses the length anew every few."""
        width = blocks.taken.shape[1]
        if width != len(self._taken):
            self._taken, self._before, self._rows = np.zeros((3, width))
            self._drafting, self._rounds, self.length = {}, 0, None
        self._shortened = self._shortened + 1 if self._shortened < WHOLE_EVERY else 0
        self._rounds += 1
        pace = max(PACE, 1 / self._rounds)
        self._row += pace * (blocks.row - self._row)
        self._beside += pace * (blocks.beside - self._beside)
        self._base += pace * (blocks.base - self._base)
        self._see_places(blocks, np.where(np.arange(width) < self.usual(width), pace, max(SELDOM, pace)))
        longest = int(blocks.asked.max())
        if np.count_nonzero(blocks.asked == longest) >= ALIKE * len(blocks.asked):
            seen = self._drafting.setdefault((blocks.requests, longest), deque(maxlen=SEEN))
            seen.append((self._rounds, blocks.drafting))
        if self._rounds >= FIRST and not self._rounds % SETTLED_EVERY:
            self._settle(blocks.requests, width)

    def _see_places(self, blocks: Blocks, pace: Floats) -> None:
        """Each place's average, of the blocks that were asked that far."""
        asked = np.arange(blocks.taken.shape[1]) < blocks.asked[:, None]
        before = np.concatenate([np.ones((len(blocks.taken), 1)), blocks.taken[:, :-1]], axis=1)
        self._taken += pace * _beyond(self._taken, blocks.taken, asked)
        self._before += pace * _beyond(self._before, before, asked)
        self._rows += pace * _beyond(self._rows, blocks.taken > 0, asked)

    def _settle(self, requests: int, block: int) -> None:
        """Choose the length with the most tokens a second, for so many requests."""
        known, now = self._known(requests), self.usual(block)
        if not known:
            return
        worth = np.cumsum(np.cumprod(self._taken / np.maximum(self._before, 1e-9)))
        beside = np.maximum(self._beside + self._row * requests * np.cumsum(self._rows), 1e-6)
        base = self._base / max(1, requests)
        rates = {
            length: (base + float(worth[length - 1])) / (float(beside[length - 1]) + _expected(known, length, block))
            for length in {*(2**power for power in range(block.bit_length()) if 2**power < block), now, block}
        }
        best = max(rates, key=lambda length: (rates[length], -length))
        if rates[best] > BETTER * rates[now]:
            self.length = best

    def _known(self, requests: int) -> dict[int, float]:
        """Seconds of drafting for so many, by length."""
        known = {}
        for (count, length), seen in self._drafting.items():
            late = [seconds for at, seconds in seen if at > self._rounds - KEPT]
            if count == requests and len(late) >= ENOUGH:
                known[length] = statistics.median(late)
        return known


def _beyond(average: Floats, values: Floats | Bools, counted: Bools) -> Floats:
    """(n,) by how much the mean of each column's counted values is greater; 0 where there are none."""
    count = counted.sum(axis=0)
    mean = np.where(counted, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    return np.where(count > 0, mean - average, 0.0)


def _expected(known: Mapping[int, float], length: int, block: int) -> float:
    """Seconds of drafting: as they were, on the line through the lengths next to it, or as one lets presume."""
    if length in known:
        return known[length]
    if len(known) == 1:
        ((only, seconds),) = known.items()
        return seconds * _presumed(length, block) / _presumed(only, block)
    lengths = sorted(known)
    above = min(max(1, sum(one < length for one in lengths)), len(lengths) - 1)
    one, other = lengths[above - 1 : above + 1]
    slope = max(0.0, (known[other] - known[one]) / (other - one))
    return max(0.0, known[one] + slope * (length - one))


def _presumed(length: int, block: int) -> float:
    """Of a whole block's time."""
    return FORWARD + (1 - FORWARD) * length / block
