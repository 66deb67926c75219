"""What alternatives to drafts are worth: the drafter's next choices at the same places, verified beside its drafts.

An alternative to the k-th draft counts where all before that stood and it did not: a_{k-1} (1 - c_k) of the time. It is
right in a share of these cases, which hardly depends on the confidence, and is followed here by setting. A row that is
right brings one token, as a draft's does, so both are ranked together. Only for coupled sampling, where what is
verified says nothing of what is chosen.
"""

from __future__ import annotations

import numpy as np

from services.router.scheduling.plan import Bools, Floats, Ints

__all__ = ["Shares", "worth"]

SHARE = 0.28  # of wrong first drafts, over 200 answers of the default target at temperature 1
PRIOR = 50.0  # cases that speak for it
HALF_LIFE = 1000.0  # cases


def worth(survival: Floats, shares: Floats) -> Floats:
    """(R, n) tokens that an alternative to each draft brings on average; at most what the draft brings.

    So an alternative is never verified without its draft, nor without those before that.

    Args:
        survival: (R, n) of the drafts, from `plan.survival_of`.
        shares: (R,) of wrong drafts whose alternative is right.
    """
    before = np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)
    return np.minimum(shares[:, None] * (before - survival), survival)


class Shares:
    """How often alternatives to wrong drafts were right, by number of a setting; 0 where none was ever offered."""

    def __init__(self) -> None:
        self._offered: set[int] = set()
        self._cases: dict[int, float] = {}
        self._right: dict[int, float] = {}

    def of(self, settings: Ints) -> Floats:
        """(R,) of these settings."""
        return np.array([self._of(int(setting)) for setting in settings], np.float64)

    def offered(self, settings: Ints) -> None:
        """Blocks came, (n,) of these settings, that name other tokens."""
        self._offered.update(settings.tolist())

    def _of(self, setting: int) -> float:
        if setting not in self._offered:
            return 0.0
        cases, right = self._cases.get(setting, 0.0), self._right.get(setting, 0.0)
        return (PRIOR * SHARE + right) / (PRIOR + cases)

    def observe(self, settings: Ints, right: Bools) -> None:
        """Cases: first wrong drafts beside which an alternative was verified, (n,) each."""
        for setting, one in zip(settings.tolist(), right.tolist(), strict=True):
            kept = 0.5 ** (1 / HALF_LIFE)
            self._cases[setting] = kept * self._cases.get(setting, 0.0) + 1.0
            self._right[setting] = kept * self._right.get(setting, 0.0) + one
