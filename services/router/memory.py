"""What a router remembers of drafts: by sequence, and by sampling mode and drafter.

Gives every sequence a slot in `scheduling.histories` when it first takes part in a round; whoever owns sequences says
when one has left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.messages import Mode, Sampling
from services.router.scheduling.alternatives import Shares
from services.router.scheduling.histories import Histories
from services.router.scheduling.plan import Ints
from services.router.scheduling.survival import Mode as ModeName
from services.router.scheduling.survival import Tracker
from services.router.sequences import Sequence as Running

__all__ = ["Memory"]


class Memory:
    """Of blocks with up to `block` tokens."""

    def __init__(self, block: int) -> None:
        self.tracker = Tracker(max(1, block))
        self.histories = Histories(self.tracker, max(1, block))
        self.shares = Shares()

    def rows(self, running: Sequence[Running]) -> tuple[Ints, Ints]:
        """(R,) slots and (R,) settings, as they are from now on."""
        settings = [self._setting(sequence) for sequence in running]
        for sequence, setting in zip(running, settings, strict=True):
            if sequence.slot is None:
                sequence.slot, sequence.setting = self.histories.join(setting), setting
            elif sequence.setting != setting:
                self.histories.move(sequence.slot, setting)
                sequence.setting = setting
        return np.array([s.slot for s in running], np.int64), np.array(settings, np.int64)

    def leave(self, sequence: Running) -> None:
        """It takes part in no round any more, or will begin anew."""
        if sequence.slot is not None:
            self.histories.leave(sequence.slot)
            sequence.slot = None

    def _setting(self, sequence: Running) -> int:
        """Between two drafters a sequence keeps to the last."""
        if sequence.drafter is None:
            return sequence.setting if sequence.setting >= 0 else self.tracker.setting(_mode(sequence), "")
        return self.tracker.setting(_mode(sequence), sequence.drafter.drafter.fingerprint)


def _mode(sequence: Running) -> ModeName:
    sampling: Sampling = sequence.request.sampling
    if sampling.greedy:
        return "greedy"
    return "rejection" if sampling.mode is Mode.REJECTION else "coupled"
