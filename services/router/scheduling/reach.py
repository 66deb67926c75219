"""How long the blocks are that are worth asking for: hardly longer than what was verified of them lately.

A drafter's sequential head runs once a token, and what the plan cuts anyway was drafted for nothing. Known before
anything is drafted, so the same in either mode. Counts rounds and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Reach"]

WINDOW = 16  # rounds


@dataclass(slots=True)
class Reach:
    """Of one cohort: whole blocks at first, and again as soon as a plan takes all that was asked for."""

    _planned: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def of(self, block: int) -> int:
        """Draft tokens to ask for, of a block: one more than any plan of late took."""
        return min(block, max(self._planned) + 1) if len(self._planned) == WINDOW else block

    def observe(self, planned: int, *, capped: bool) -> None:
        """The longest verify length of a round's plan, and whether some block was taken as far as it was asked for."""
        if capped:
            self._planned.clear()
        else:
            self._planned.append(planned)
