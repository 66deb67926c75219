"""Where nobody is drafted for, or everybody and their blocks come unasked, a decision stands for some rounds.

Deciding takes time as well: a few tenths of a millisecond a round, on cores that a verify worker shares, are worth more
than to hear the same answer again. A sequence that comes or goes, nears its end or loses its drafter, or a prompt, ends
the rest at once; costs and other routers' loads are looked at again with the next decision. How much of each block is
verified is decided every round (`plan`). Decides nothing itself; those who count rounds are told how many went by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.router.proposing import SLACK
from services.router.round import Round
from services.router.rows import standing
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
        if stands.asked.any() and not _goes_on(running, stands.most.tolist()):
            return None
        self.rounds += 1
        return replace(stands, context=sum(s.committed_len for s in running) / len(running))

    def decided(self, round_: Round) -> None:
        """What was decided anew: it stands if it was that nothing is to be done, or nothing else than before."""
        probe = round_.decision is not None and round_.decision.probe
        usual = bool(round_.running) and not probe and not round_.prompts
        wanted = bool(round_.asked.any()) or any(s.chosen for s in round_.running)
        same = _everybody(round_) if wanted else round_.plain
        self._stands = round_ if usual and same else None
        self.rounds = 1


def _goes_on(running: Sequence[Running], most: Sequence[int]) -> bool:
    """Whether as much comes unasked as before, and nobody is so near the end that less is wanted."""
    return all(s.standing == own < s.left - 1 for s, own in zip(running, most, strict=True))


def _everybody(round_: Round) -> bool:
    """Whether all of the scheduler's blocks come unasked, and will, as long as they are; nothing is tried out."""
    here = standing(round_)
    if not (round_.asked.all() and all(s.chosen for s in round_.running)):  # else some are to leave, or it is a look
        return False
    settled = round_.scheduled & (round_.explored < 0) & ~round_.once & (here > 0)
    kept = (round_.most == here) & (round_.following > 0)
    kept &= (round_.following <= here) & (here <= round_.following + SLACK)
    return bool((settled & kept).all()) and round_.kind != "rejection"
