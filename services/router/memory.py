"""What a router remembers of drafts: by sequence, and by sampling mode and drafter.

Gives every sequence a slot in `scheduling.histories` when it first takes part in a round; whoever owns sequences says
when one has left. What a round costs, and whether drafts paid, is remembered elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.messages import Mode, Sampling
from services.router.round import Round, Took
from services.router.scheduling.alternatives import Shares, worth
from services.router.scheduling.histories import Histories
from services.router.scheduling.plan import Bools, Floats, Ints, survival_of
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

    # ------------------------------------------------------------ of a round's blocks

    def corrected(self, round_: Round) -> Floats:
        """(R, n) confidences of the blocks that came, as they are to be believed."""
        nudge = self.histories.nudge(round_.slots)
        return self.tracker.corrected(round_.settings, round_.confidences, nudge)

    def alternatives(self, round_: Round, offered: Bools) -> Floats:
        """(R, n) what the alternatives that were offered would bring; where some were is remembered."""
        self.shares.offered(round_.settings[offered.any(axis=1)])
        survival = survival_of(round_.corrected, round_.most)
        return np.where(offered, worth(survival, self.shares.of(round_.settings)), 0.0)

    def expected(self, round_: Round, survival: Floats) -> Floats:
        """(R, n) what alternatives would bring to blocks of these survivals, where such are usual."""
        return worth(survival, self.shares.of(round_.settings))

    def learn(self, round_: Round, took: Took) -> Ints:
        """What became of the blocks; returns the rows that were judged and are whose they were."""
        assert round_.outcome is not None
        owners = zip(round_.running, round_.slots.tolist(), round_.settings.tolist(), strict=True)
        stayed = np.array([[s.slot, s.setting] == own for s, *own in owners], np.bool_)  # or drafter has changed
        self.histories.skipped(round_.slots[stayed & ~round_.proposed])
        rows = np.flatnonzero((took.matched >= 0) & stayed & round_.proposed)
        if len(rows):
            verified, matched = round_.outcome.verify[rows], took.matched[rows]
            planned, asked = round_.outcome.planned[rows], round_.most[rows]
            self.tracker.observe(
                round_.settings[rows], round_.confidences[rows], verified, matched, planned=planned, asked=asked
            )
            self.histories.observe(round_.slots[rows], round_.corrected[rows], verified, matched, asked=asked)
            self._see_alternatives(round_, rows, took)
        return rows

    def _see_alternatives(self, round_: Round, rows: Ints, took: Took) -> None:
        """Of first wrong drafts, those beside which another token was verified."""
        beside = round_.outcome.alternatives if round_.outcome is not None else None
        if beside is not None:
            beside = beside & (np.cumsum(beside, axis=1) <= took.alternatives[:, None])  # there may have been no room
            wrong = np.minimum(took.matched[rows], beside.shape[1] - 1)
            rows = rows[beside[rows, wrong] & (took.matched[rows] < beside.shape[1])]
            self.shares.observe(round_.settings[rows], took.turned[rows])

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
