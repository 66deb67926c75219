"""Where nobody is drafted for, a decision stands for some rounds of the same sequences: deciding takes time as well.

A few tenths of a millisecond a round, on cores that a verify worker shares, are worth more than to hear the same answer
again. A sequence that comes or goes, or a prompt, ends the rest at once; drafters, costs and other routers' loads are
looked at again with the next decision. Decides nothing itself; those who count rounds are told how many went by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.router.round import Round
from services.router.sequences import Sequence as Running

__all__ = ["RESTED", "Rest"]

RESTED = 3  # rounds that a decision stands for after its own


@dataclass(slots=True)
class Rest:
    """The state of one cohort. `rounds`: since the last decision, its own included."""

    rounds: int = 1
    _stands: Round | None = None

    def again(self, running: Sequence[Running], prompts: Sequence[Running]) -> Round | None:
        """The next round, as decided before; None where it is to be decided."""
        stands = self._stands
        if not running or stands is None or prompts or self.rounds > RESTED or [s.key for s in running] != stands.keys:
            return None
        self.rounds += 1
        return replace(stands, context=sum(s.committed_len for s in running) / len(running))

    def decided(self, round_: Round) -> None:
        """What was decided anew: it stands if it was that nothing is to be done, for nobody."""
        probe = round_.decision is not None and round_.decision.probe
        idle = bool(round_.running) and round_.plain and not probe and not round_.prompts
        wanted = bool(round_.asked.any()) or any(s.chosen for s in round_.running)
        self._stands = round_ if idle and not wanted else None
        self.rounds = 1
