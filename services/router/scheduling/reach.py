"""How long the blocks are that are worth asking for: by what plans took of their places lately, and what these cost.

A drafter's sequential head runs once a token and its layers once a row, and what the plan cuts anyway was drafted for
nothing. Known before anything is drafted, so the same in either mode. Knows no requests and no clock.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from services.router.scheduling.plan import Floats, Ints

__all__ = ["Reach"]

FIRST = 8  # rounds of whole blocks; fewer than a router's first ones that draft in any case (`looks`)
WHOLE_EVERY = 64  # rounds, of which one asks for whole blocks: what lies behind a step in the costs shows there only
SETTLED_EVERY = 8  # rounds, after which the length is chosen anew
PACE = 1 / 16  # of averages, by round
BETTER = 1.01  # times the tokens a second, for which a length is left
SEEN = 9  # drafts of a length that count
ENOUGH = 3  # of these: what is first of its kind takes longer
FORWARD = 0.6  # of a whole block's time, that a block of no tokens would take: presumed


@dataclass(slots=True)
class Reach:
    """Of one cohort's batches of one kind: whole blocks at first.

    What place k brings is what place k - 1 does, times a share that is followed in those rounds alone that asked for
    it: so shorter blocks do not hide what longer ones would bring as the text gets easier.
    """

    length: int | None = None
    _taken: Floats = field(default_factory=lambda: np.zeros(0))  # a block's tokens at each place, where plans take it
    _before: Floats = field(default_factory=lambda: np.zeros(0))  # and at the place before it, in the same rounds
    _beside: float = 0.0  # seconds of a round beside drafting
    _drafting: dict[tuple[int, int], deque[float]] = field(default_factory=dict)  # seconds, by requests and length
    _rounds: int = 0
    _shortened: int = 0

    def usual(self, block: int) -> int:
        """Draft tokens asked for of a block, but in a round of whole ones."""
        return block if self.length is None else min(block, self.length)

    def of(self, block: int) -> int:
        """Draft tokens to ask for in the next round."""
        return block if self._shortened >= WHOLE_EVERY else self.usual(block)

    def observe(self, taken: Floats, asked: Ints, *, drafting: float, beside: float) -> None:
        """What became of a round's blocks.

        Args:
            taken: (R, n) the survival of drafts that the plan took, 0 of all others.
            asked: (R,) draft tokens that were asked for.
            drafting: seconds that the round waited for them.
            beside: all others.
        """
        if taken.shape[1] != len(self._taken):
            self._taken, self._before = np.zeros((2, taken.shape[1]))
            self._rounds, self.length = 0, None
        self._shortened = 0 if self._shortened >= WHOLE_EVERY else self._shortened + 1
        self._rounds += 1
        pace = max(PACE, 1 / self._rounds)
        seen, mean = np.arange(taken.shape[1]) < asked.min(), taken.mean(axis=0)
        self._taken += np.where(seen, pace * (mean - self._taken), 0.0)
        self._before += np.where(seen, pace * (np.append(1.0, mean[:-1]) - self._before), 0.0)
        self._beside += pace * (beside - self._beside)
        if asked.min() == asked.max():
            self._drafting.setdefault((len(asked), int(asked[0])), deque(maxlen=SEEN)).append(drafting)
        if self._rounds >= FIRST and not self._rounds % SETTLED_EVERY:
            self._settle(len(asked), taken.shape[1])

    def _settle(self, requests: int, block: int) -> None:
        """Choose the length with the most tokens a second, for so many requests."""
        now, known = self.usual(block), self._known(requests)
        if now not in known:
            return
        worth = np.cumsum(np.cumprod(self._taken / np.maximum(self._before, 1e-9)))
        lengths = {*(2**power for power in range(block.bit_length()) if 2**power < block), now, block}
        rates = {
            length: (1 + float(worth[length - 1])) / (self._beside + _expected(known, length, now, block))
            for length in lengths
        }
        best = max(rates, key=lambda length: (rates[length], -length))
        if self.length is None or rates[best] > BETTER * rates[now]:
            self.length = best

    def _known(self, requests: int) -> dict[int, float]:
        """Seconds of drafting for so many, by length."""
        own = {length: seen for (count, length), seen in self._drafting.items() if count == requests}
        return {length: statistics.median(seen) for length, seen in own.items() if len(seen) >= ENOUGH}


def _expected(known: Mapping[int, float], length: int, now: int, block: int) -> float:
    """Seconds of drafting: as they were, on the line through the two nearest lengths, or as one lets presume."""
    if length in known:
        return known[length]
    if len(known) == 1:
        return known[now] * _presumed(length, block) / _presumed(now, block)
    (one, first), (other, second) = sorted(known.items(), key=lambda item: abs(item[0] - length))[:2]
    slope = max(0.0, (second - first) / (other - one))
    return max(0.0, first + slope * (length - one))


def _presumed(length: int, block: int) -> float:
    """Of a whole block's time."""
    return FORWARD + (1 - FORWARD) * length / block
