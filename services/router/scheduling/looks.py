"""When to draft although it does not seem to pay: what is never tried is never seen to have changed.

A profile measured beside other work may call drafting dearer than it is, and without drafts no step would ever put that
right. So a router's first rounds draft whatever costs say, and where nobody is drafted for, short series of rounds look
again, ever more seldom; both as far as `allowance` lets anybody draft. What pays at one size of load says nothing of
others, so each has its own waits. Whether rounds with drafts then win is seen elsewhere (`payoff`); this counts rounds
and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Looks"]

FIRST = 16  # rounds: enough to move a cost's median, see `dspark.costs.refined`
SERIES = 4
FIRST_WAIT, LONGEST_WAIT = 64, 512  # rounds between series


@dataclass(slots=True)
class _Waits:
    """At one size of load."""

    left: int = 0
    wait: int = FIRST_WAIT
    since: int = 0

    def due(self, rounds: int, *, pays: bool) -> bool:
        if self.left:
            self.left -= 1
            return not pays
        if pays:
            self.since, self.wait = 0, FIRST_WAIT
            return False
        self.since += rounds
        if self.since < self.wait:
            return False
        self.since, self.wait, self.left = 0, min(2 * self.wait, LONGEST_WAIT), SERIES - 1
        return True


@dataclass(slots=True)
class Looks:
    """The state of one cohort."""

    _left: int = FIRST
    _sizes: dict[int, _Waits] = field(default_factory=dict)

    def due(self, load: int, rounds: int = 1, *, pays: bool) -> bool:
        """Whether this round, of `load` rows before any drafts, drafts though it does not seem to pay.

        `rounds`: since it was last asked. Sizes of load are 1, 2 to 3, 4 to 7 rows and so on.
        """
        if self._left > 0:
            self._left -= 1
            return not pays
        return self._sizes.setdefault(load.bit_length(), _Waits()).due(rounds, pays=pays)
