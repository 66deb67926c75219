"""How long the blocks are that are worth asking for: hardly longer than what was verified of them lately.

A drafter's sequential head runs once a token, and what the plan cuts anyway was drafted for nothing. Known before
anything is drafted, so the same in either mode. Counts rounds and nothing else.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Reach"]

WINDOW = 8  # rounds; fewer than a router's first ones that draft in any case (`looks`)
WHOLE_EVERY = 64  # rounds, of which one asks for whole blocks: what lies behind a step in the costs shows there only


@dataclass(slots=True)
class Reach:
    """Of one cohort: whole blocks at first."""

    _planned: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _shortened: int = 0

    def usual(self, block: int) -> int:
        """Draft tokens asked for of a block, but in a round of whole ones: one more than any plan of late took."""
        return min(block, max(self._planned) + 1) if len(self._planned) == WINDOW else block

    def of(self, block: int) -> int:
        """Draft tokens to ask for in the next round."""
        return block if self._shortened >= WHOLE_EVERY else self.usual(block)

    def observe(self, planned: int, *, capped: bool) -> None:
        """The longest verify length of a round's plan, and whether some block was taken as far as it was asked for.

        Then twice as much is asked for: not all at once, for what whole blocks cost may be more than any is worth.
        """
        self._shortened = 0 if self._shortened >= WHOLE_EVERY else self._shortened + 1
        self._planned.append(2 * planned if capped else planned)
