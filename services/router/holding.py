"""Whether features may wait at the verify worker: while nobody is drafted for they need not leave after every step.

A block can only be drafted from features that are there. So a round that wants blocks while features are held back has
them sent, and drafts one round later for the same sequences. Decides nothing about drafting itself, see
`services.router.scheduler`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dspark.messages import SequenceKey
from services.router.round import Round
from services.router.scheduling.payoff import Decision
from services.router.scheduling.plan import FREE, Bools

__all__ = ["QUIET", "Holding"]

QUIET = 4  # rounds without drafts, after which features are held back


@dataclass(slots=True)
class Holding:
    """The state of one cohort."""

    _quiet: int = 0
    _held: bool = False
    _decision: Decision | None = None
    _postponed: dict[SequenceKey, int] = field(default_factory=dict)  # whom to draft for, and how much to explore

    @property
    def postponed(self) -> bool:
        """Whether the round before this one wanted drafts and waits for their features."""
        return bool(self._postponed)

    @property
    def decision(self) -> Decision | None:
        """That of the round before, where its drafts were postponed."""
        return self._decision if self._postponed else None

    def resume(self, round_: Round, bound: Bools) -> None:
        """Draft for whom the round before would have. `bound`: (R,) whom that concerns; others as they wish."""
        wanted = np.array([key in self._postponed for key in round_.keys], np.bool_)
        explored = np.array([self._postponed.get(key, FREE) for key in round_.keys], np.int64)
        round_.explored = np.where(explored < 0, explored, np.minimum(explored, round_.most))
        round_.asked = (round_.most > 0) & np.where(bound, wanted, True)

    def settle(self, round_: Round, *, coming: bool) -> None:
        """Postpone what has no features yet, and say whether those of this round's step may wait.

        `coming`: whether anybody is to be drafted for who has a drafter or is about to.
        """
        postpones = self._held and bool(round_.drafting.any())
        asked = zip(round_.keys, round_.explored.tolist(), round_.drafting, strict=True)
        self._postponed = {key: explored for key, explored, own in asked if own} if postpones else {}
        self._decision = round_.decision
        if postpones:
            round_.asked, round_.drafting = np.zeros_like(round_.asked), np.zeros_like(round_.drafting)
            round_.explored = np.full_like(round_.explored, FREE)
        quiet = round_.running and not coming  # a round of prompts alone says nothing of the rounds after it
        self._quiet = self._quiet + 1 if quiet else 0
        self._held = round_.hold_features = self._quiet >= QUIET
