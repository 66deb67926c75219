"""What alternatives to drafts are worth: the drafter's next choices at the same places, verified beside its drafts.

An alternative to the k-th draft counts where all before that stood and it did not: a_{k-1} (1 - c_k) of the time. It is
right in a share of these cases, which hardly depends on the confidence, and is followed here by setting. A row that is
right brings one token, as a draft's does, so both are ranked together. Only for coupled sampling, where what is
verified says nothing of what is chosen.
"""

from __future__ import annotations

import numpy as np

from services.router.scheduling.plan import Bools, Floats, Ints, survival_of

__all__ = ["Shares", "worth"]

SHARE = 0.28  # of wrong first drafts, over 200 answers of the default target at temperature 1
PRIOR = 50.0  # cases that speak for it
HALF_LIFE = 1000.0  # cases


def worth(confidences: Floats, most: Ints, offered: Bools, shares: Floats) -> Floats:
    """(R, n) tokens that each alternative brings on average, 0 where there is none; at most what its draft brings.

    So an alternative is never verified without its draft, nor without those before that.

    Args:
        confidences: (R, n) c_{r,j}, 0 where nothing was proposed.
        most: (R,) from `plan.limits`.
        offered: (R, n) where the drafter named another token.
        shares: (R,) of wrong drafts whose alternative is right.
    """
    survival = survival_of(confidences, most)
    before = np.concatenate([np.ones((len(survival), 1)), survival[:, :-1]], axis=1)
    return np.where(offered, np.minimum(shares[:, None] * (before - survival), survival), 0.0)


class Shares:
    """How often alternatives to wrong drafts were right, by number of a setting."""

    def __init__(self) -> None:
        self._cases: dict[int, float] = {}
        self._right: dict[int, float] = {}

    def of(self, settings: Ints) -> Floats:
        """(R,) of these settings."""
        return np.array([self._of(int(setting)) for setting in settings], np.float64)

    def _of(self, setting: int) -> float:
        cases, right = self._cases.get(setting, 0.0), self._right.get(setting, 0.0)
        return (PRIOR * SHARE + right) / (PRIOR + cases)

    def observe(self, settings: Ints, right: Bools) -> None:
        """Cases: first wrong drafts beside which an alternative was verified, (n,) each."""
        for setting, one in zip(settings.tolist(), right.tolist(), strict=True):
            kept = 0.5 ** (1 / HALF_LIFE)
            self._cases[setting] = kept * self._cases.get(setting, 0.0) + 1.0
            self._right[setting] = kept * self._right.get(setting, 0.0) + one
