"""Confidence logits to probabilities, as the drafter's calibration says for each request's setting (DSpark §3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dspark.messages import Sampling
from dspark.models.drafters.calibration import Calibration, setting_of

__all__ = ["Confidences", "Curves"]

Floats: TypeAlias = NDArray[np.float64]

_CERTAIN = 1e30  # log-odds of what is certain: infinity times no bend at all would be no number


class Curves:
    """Calibrations of s settings as arrays; on so few numbers numpy takes a fraction of torch's time."""

    def __init__(self, calibrations: Sequence[Calibration]) -> None:
        """All for blocks of n tokens."""
        self._temperatures = np.array([own.temperatures for own in calibrations])
        self._biases = np.array([own.biases for own in calibrations])
        bends = [own.bends or ((),) * len(own.temperatures) for own in calibrations]
        most = max((len(one) for each in bends for one in each), default=0)
        padded = [[(*one, *((0.0, 0.0),) * (most - len(one))) for one in each] for each in bends]
        self._bends = np.array(padded).reshape(*self._biases.shape, most, 2)  # also where most is 0

    def of(self, logits: Floats, rows: Sequence[int]) -> Floats:
        """Logits (b, at most n), each row by the calibration of that number (b,), to log-odds of the same shape."""
        n = logits.shape[1]
        bends = self._bends[rows, :n]
        logits = np.clip(logits, -_CERTAIN, _CERTAIN)
        straight = logits / self._temperatures[rows, :n] + self._biases[rows, :n]
        turned = np.maximum(logits[..., None] - bends[..., 0], 0.0) * bends[..., 1]
        return np.asarray(straight + turned.sum(-1))


class Confidences:
    """c_k = sigmoid(curve_k(logit_k)); where a setting was never calibrated, logits are log-odds as they are."""

    def __init__(self, calibrations: Sequence[Calibration], block_size: int) -> None:
        """Each calibration has `block_size` entries."""
        self._rows = {own.setting: row for row, own in enumerate(calibrations, start=1)}
        self._curves = Curves([Calibration("", (1.0,) * block_size, (0.0,) * block_size), *calibrations])

    def of(self, logits: Tensor, samplings: Sequence[Sampling], settled: Sequence[bool] | None = None) -> Floats:
        """Logits (b, n) on any device, n at most the block size -> probabilities (b, n).

        Rows that are `settled` are log-odds already.
        """
        rows = [self._rows.get(setting_of(sampling), 0) for sampling in samplings]
        if settled is not None:
            rows = [0 if own else row for own, row in zip(settled, rows, strict=True)]
        log_odds = self._curves.of(logits.double().cpu().numpy(), rows)
        odds = np.exp(-np.abs(log_odds))
        return np.asarray(np.where(log_odds < 0, odds, 1.0) / (1.0 + odds))  # the sigmoid, which never overflows
