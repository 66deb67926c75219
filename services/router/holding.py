"""What nobody drafts for costs no draft worker anything: features wait at the verify worker, nobody is attached.

A block can only be drafted from features that are there. So a round that wants blocks of sequences whose features are
held, or that have no drafter yet, sees to that and drafts for them when both are there, mostly a round later. Decides
nothing about drafting itself, see `services.router.scheduler`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dspark.messages import SequenceKey
from services.router.round import Round
from services.router.rows import unattached
from services.router.scheduling.payoff import Decision
from services.router.scheduling.plan import FREE, Bools, Ints

__all__ = ["PATIENCE", "QUIET", "Holding"]

QUIET = 4  # rounds without drafts, after which a sequence's features are held, or a new one begins so
PATIENCE = 4  # rounds that want drafts of a held sequence, before it is drafted for


class _Wanted(NamedTuple):
    """What is wanted of a sequence that cannot be drafted for yet: how much to explore, and whether for one round."""

    explored: int
    once: bool


@dataclass(slots=True)
class Holding:
    """The state of one cohort."""

    _quiet: Counter[int] = field(default_factory=Counter)  # by size of load: rounds in which nobody was drafted for
    _held: bool = False  # all features of the round before
    _decision: Decision | None = None
    _postponed: dict[SequenceKey, _Wanted] = field(default_factory=dict)
    _all: bool = False
    _again: bool = False  # what is postponed has been drafted for once, and is once more

    @property
    def all_postponed(self) -> bool:
        """Whether the rounds before this one wanted drafts and could have none of them."""
        return self._all

    @property
    def decision(self) -> Decision | None:
        """That of the rounds before, where all of their drafts were postponed."""
        return self._decision if self._all else None

    def quiet(self, streams: int) -> bool:
        """Whether nobody was to be drafted for when there were last about so many streams."""
        return self._quiet[streams.bit_length()] >= QUIET

    def lasting(self, round_: Round, chosen: Bools) -> Bools:
        """(R,) those of the chosen who are drafted for already, or have been chosen for a while.

        Beginning costs features and K/V of a whole text, so a load that falls for a few rounds, as between a stream's
        end and the next one's beginning, is nothing to begin for.
        """
        for sequence, own in zip(round_.running, chosen, strict=True):
            sequence.chosen = sequence.chosen + 1 if own else 0
        waits = [s.quiet >= QUIET and s.chosen < PATIENCE for s in round_.running]
        return chosen & ~np.array(waits, np.bool_)

    def postponed(self, round_: Round) -> Bools:
        """(R,) whom the round before would have drafted for."""
        return np.array([key in self._postponed for key in round_.keys], np.bool_)

    def explored(self, round_: Round, otherwise: Ints) -> Ints:
        """(R,) what the round before would have explored of those; `otherwise` of the others."""
        if not self._postponed:
            return otherwise
        stored = [self._postponed[key].explored if key in self._postponed else None for key in round_.keys]
        pairs = zip(stored, otherwise.tolist(), round_.most.tolist(), strict=True)
        return np.array([own if kept is None else min(kept, most) for kept, own, most in pairs], np.int64)

    def resume(self, round_: Round, bound: Bools) -> None:
        """Draft for whom the round before would have. `bound`: (R,) whom that concerns; others as they wish."""
        wanted = self.postponed(round_)
        round_.explored = self.explored(round_, np.full(len(round_.keys), FREE))
        round_.once = np.array([key in self._postponed and self._postponed[key].once for key in round_.keys], np.bool_)
        round_.asked = (round_.most > 0) & np.where(bound, wanted, True)

    def settle(self, round_: Round, coming: Bools) -> bool:
        """Postpone what cannot be drafted for yet, and say whose features may wait after this round's step.

        `coming`: (R,) who is to be drafted for and has a drafter, or may have one. Returns whether somebody needs one.
        """
        held = np.array([sequence.quiet >= QUIET for sequence in round_.running], np.bool_)
        self._postpone(round_, round_.drafting & (held | unattached(round_)))
        needs = False
        for sequence, own in zip(round_.running, coming, strict=True):
            needs |= own and sequence.dormant
            sequence.dormant &= not own
            sequence.quiet = 0 if own else sequence.quiet + 1
        size = round_.streams.bit_length()
        if round_.running:  # a round of prompts alone says nothing of the rounds after it
            self._quiet[size] = 0 if coming.any() else self._quiet[size] + 1
        for prompt in round_.prompts:
            prompt.quiet = self._quiet[size]
        round_.held = np.array([sequence.quiet >= QUIET for sequence in round_.running], np.bool_)
        round_.prompts_held = self.quiet(round_.streams)
        held_before, self._held = self._held, bool(round_.held.all()) and (round_.prompts_held or not round_.prompts)
        round_.plain = held_before and self._held
        return bool(needs)

    def _postpone(self, round_: Round, late: Bools) -> None:
        round_.catches_up = bool((self.postponed(round_) & round_.drafting & ~late).any()) and not self._again
        probe = round_.decision is not None and round_.decision.probe
        if self._all and probe and round_.catches_up and not late.any():
            self._again = True  # a probe is judged by its second round, whose contexts are there
            return
        asked = zip(round_.keys, round_.explored.tolist(), round_.once.tolist(), late, strict=True)
        self._postponed = {key: _Wanted(explored, once) for key, explored, once, own in asked if own}
        self._all = bool(late.any()) and not (round_.drafting & ~late).any()
        self._again = False
        self._decision = round_.decision
        round_.asked, round_.drafting = round_.asked & ~late, round_.drafting & ~late
        round_.explored = np.where(late, FREE, round_.explored)
