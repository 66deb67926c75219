"""What each sequence's earlier rounds say of its next block: rows of arrays, so that a round costs no loop.

A sequence joins with a setting of `survival`, holds a slot until it leaves, and falls back to its setting's averages
the longer it has not been drafted for. Predictions use earlier rounds only.
"""

from __future__ import annotations

import numpy as np

from services.router.scheduling.plan import Bools, Floats, Ints
from services.router.scheduling.survival import Tracker, continued, trials

__all__ = ["Histories"]

PACE = 0.25  # of a sequence's moving averages, by round with drafts
FORGET = 1 / 32  # of what is known of a sequence, by round without
NUDGE_PRIOR = 6.0  # information that speaks for the setting's average: some 30 trials
NUDGE_KEPT = 0.98  # of a sequence's information, by trial
NUDGE_MOST = 2.0


class Histories:
    """Moving averages by slot and position."""

    def __init__(self, tracker: Tracker, block: int, *, slots: int = 64) -> None:
        self._tracker = tracker
        self._block = block
        self._free: list[int] = []
        self._setting = np.zeros(0, np.int64)
        self._known = np.zeros(0)  # 0: nothing; towards 1 with rounds, and back with time
        self._survival = np.zeros((0, block))
        self._last = np.zeros((0, block))
        self._length = np.zeros(0)
        self._nudge = np.zeros(0)
        self._information = np.zeros(0)
        self._grow(slots)

    # ------------------------------------------------------------ membership

    def join(self, setting: int) -> int:
        """A slot for a new sequence."""
        if not self._free:
            self._grow(2 * len(self._setting))
        slot = self._free.pop()
        self._setting[slot] = setting
        for figures in (self._known, self._survival, self._last, self._length, self._nudge, self._information):
            figures[slot] = 0
        return slot

    def leave(self, slot: int) -> None:
        """The sequence has ended; its slot is for others."""
        self._free.append(slot)

    def move(self, slot: int, setting: int) -> None:
        """The sequence has another drafter: what its drafts were worth is forgotten."""
        self._setting[slot] = setting
        self._known[slot] = self._nudge[slot] = self._information[slot] = 0

    def _grow(self, size: int) -> None:
        old = len(self._setting)
        self._free += range(size - 1, old - 1, -1)
        self._setting = np.resize(self._setting, size)
        for name in ("_known", "_length", "_nudge", "_information"):
            setattr(self, name, np.append(getattr(self, name), np.zeros(size - old)))
        for name in ("_survival", "_last"):
            setattr(self, name, np.vstack([getattr(self, name), np.zeros((size - old, self._block))]))

    # ------------------------------------------------------------ before a round

    def settings(self, slots: Ints) -> Ints:
        """(R,) the settings' numbers."""
        return np.asarray(self._setting[slots])

    def nudge(self, slots: Ints) -> Floats:
        """(R,) log-odds by which a sequence's drafts beat its setting's; for drafters without confidences."""
        return np.asarray(self._nudge[slots])

    def predicted(self, slots: Ints) -> Floats:
        """(R, n) expected survival of each sequence's next block, for `whom_to_draft`."""
        return self._blend(slots, self._survival[slots])

    def before(self, slots: Ints) -> Floats:
        """(R, n) survival of each one's last block, for a capacity.

        Not an average: what a ranking can gain depends on how far apart single blocks are, which averages hide.
        """
        return np.where(self._known[slots, None] > 0.1, self._last[slots], self._blend(slots, self._survival[slots]))

    def lengths(self, slots: Ints) -> Floats:
        """(R,) moving average of accepted draft tokens a round."""
        return np.asarray(self._length[slots])

    def _blend(self, slots: Ints, own: Floats) -> Floats:
        known = self._known[slots, None]
        return known * own + (1 - known) * self._tracker.average(self._setting[slots])

    # ------------------------------------------------------------ after a round

    def observe(
        self, slots: Ints, chance: Floats, verified: Ints, accepted: Ints, *, asked: Ints | None = None
    ) -> None:
        """Takes in the blocks of a round.

        Args:
            slots: (R,) of the sequences with a proposal; no slot twice.
            chance: (R, n) c'_k as corrected for the plan.
            verified: (R,) draft tokens.
            accepted: (R,) of them.
            asked: (R,) draft tokens that the drafter was asked for; whole blocks unless given.
        """
        width = chance.shape[1]
        whole = chance if asked is None else continued(chance, asked, self.predicted(slots)[:, :width])
        survival = np.zeros((len(slots), self._block))
        survival[:, :width] = np.cumprod(whole, axis=1)
        # The first rounds average evenly; later ones move at the pace.
        pace = np.where(self._known[slots] > 0, PACE, 1.0)
        self._survival[slots] += pace[:, None] * (survival - self._survival[slots])
        self._length[slots] += pace * (accepted - self._length[slots])
        self._last[slots] = survival
        self._known[slots] += PACE * (1 - self._known[slots])
        self._follow(slots, chance, *trials(verified, accepted, chance.shape[1]))

    def skipped(self, slots: Ints) -> None:
        """These were not drafted for in this round."""
        self._known[slots] *= 1 - FORGET

    def _follow(self, slots: Ints, chance: Floats, tested: Bools, success: Bools) -> None:
        residual = np.where(tested, success - chance, 0.0).sum(axis=1)
        added = np.where(tested, chance * (1 - chance), 0.0).sum(axis=1)
        self._information[slots] = self._information[slots] * NUDGE_KEPT ** tested.sum(axis=1) + added
        step = residual / (self._information[slots] + NUDGE_PRIOR)
        self._nudge[slots] = np.clip(self._nudge[slots] + step, -NUDGE_MOST, NUDGE_MOST)
