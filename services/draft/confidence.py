"""Confidence logits to probabilities, as the drafter's calibration says for each request's setting (DSpark §3.2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.messages import Sampling
from dspark.models.drafters.calibration import Calibration, setting_of

__all__ = ["Confidences"]


class Confidences:
    """c_k = sigmoid(logit_k / T_k + b_k); where a setting was never calibrated, T_k = 1 and b_k = 0."""

    def __init__(self, calibrations: Sequence[Calibration], block_size: int) -> None:
        """Each calibration has `block_size` entries."""
        self._rows = {own.setting: row for row, own in enumerate(calibrations, start=1)}
        self._temperatures = torch.tensor([[1.0] * block_size, *(own.temperatures for own in calibrations)])
        self._biases = torch.tensor([[0.0] * block_size, *(own.biases for own in calibrations)])

    def of(self, logits: Tensor, samplings: Sequence[Sampling], settled: Sequence[bool] | None = None) -> Tensor:
        """Float32 logits (b, n) on any device, n at most the block size -> probabilities (b, n) on the CPU.

        Rows that are `settled` are log-odds already.
        """
        logits = logits.float().cpu()
        rows = [self._rows.get(setting_of(sampling), 0) for sampling in samplings]
        if settled is not None:
            rows = [0 if own else row for own, row in zip(settled, rows, strict=True)]
        n = logits.shape[1]
        return (logits / self._temperatures[rows, :n] + self._biases[rows, :n]).sigmoid()
