"""What a part of a block takes to draft, as a share of a whole one: a profile knows whole blocks only.

Seen from the drafts of a worker, one median a length. Knows no requests and no clock.
"""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["Parts"]

WINDOW = 9  # drafts of a length that count
PRESUMED = 5  # of these, what is presumed before there are any: a first one that was held up decides nothing
FORWARD = 0.5  # of a whole block's time, that a block of no tokens would take: presumed


class Parts:
    """Of one draft worker's blocks of up to `block` tokens."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._seen: dict[int, deque[float]] = {}

    def observe(self, tokens: int, share: float) -> None:
        """A batch of blocks of so many tokens took this share of what whole blocks would have."""
        if tokens not in self._seen:
            self._seen[tokens] = deque([self._presumed(tokens)] * PRESUMED, WINDOW)
        self._seen[tokens].append(share)

    def of(self, tokens: int) -> float:
        """The share expected; 1 for whole blocks, unless they were seen to take something else."""
        seen = self._seen.get(tokens)
        return statistics.median(seen) if seen else self._presumed(tokens)

    def _presumed(self, tokens: int) -> float:
        return FORWARD + (1 - FORWARD) * min(1.0, tokens / self._block)
