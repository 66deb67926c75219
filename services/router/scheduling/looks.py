"""When to draft although it does not seem to pay: what is never tried is never seen to have changed.

A profile measured beside other work may call drafting dearer than it is, and without drafts no step would ever put that
right. So a router's first rounds draft in any case, and where nobody is drafted for, short series of rounds look again,
ever more seldom. Whether rounds with drafts then win is seen elsewhere (`payoff`); this counts rounds and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Looks"]

FIRST = 16  # rounds: enough to move a cost's median, see `dspark.costs.refined`
SERIES = 4
FIRST_WAIT, LONGEST_WAIT = 32, 512  # rounds between series


@dataclass(slots=True)
class Looks:
    """The state of one cohort. `first`: whether rounds are still the first ones, before any later series."""

    first: bool = True
    _left: int = FIRST
    _wait: int = FIRST_WAIT
    _since: int = 0

    def due(self, *, pays: bool) -> bool:
        """Whether this round drafts though it does not seem to pay. Called once a round."""
        if self._left:
            self._left -= 1
            return not pays
        if pays:
            self._since, self._wait = 0, FIRST_WAIT
            return False
        self._since += 1
        if self._since < self._wait:
            return False
        self._since, self._wait, self._left = 0, min(2 * self._wait, LONGEST_WAIT), SERIES - 1
        self.first = False
        return True
