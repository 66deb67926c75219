"""Sampling settings of many rows as tensors, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.kernels.noise import signed_seed
from dspark.messages import Sampling

__all__ = ["UNFILTERED", "SamplingRows"]

UNFILTERED = Sampling()
"""Temperature 1 and no filter: the model's own distribution."""


@dataclass(frozen=True, eq=False)
class SamplingRows:
    """Columns of shape (rows, 1): what `Sampling` says, for rows with temperature > 0.

    `seed` holds int64 bit patterns, `top_k` is int64 with 0 for off; the rest is float64.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    filtered: bool
    """Whether any row has a filter on."""

    @staticmethod
    def of(samplings: Sequence[Sampling], device: torch.device) -> SamplingRows:
        """Columns from settings; greedy rows get temperature 1, their choice does not depend on it."""
        floats = torch.tensor(
            [(s.temperature or 1.0, s.top_p, s.min_p) for s in samplings], dtype=torch.float64, device=device
        )
        ints = torch.tensor([(s.top_k, signed_seed(s.seed)) for s in samplings], dtype=torch.int64, device=device)
        temperature, top_p, min_p = floats.unsqueeze(-1).unbind(1)
        top_k, seed = ints.unsqueeze(-1).unbind(1)
        filtered = any(s.filtered for s in samplings)
        return SamplingRows(temperature, top_k, top_p, min_p, seed, filtered)

    def at(self, row: int) -> SamplingRows:
        """One row of these."""
        cut = slice(row, row + 1)
        return SamplingRows(
            self.temperature[cut], self.top_k[cut], self.top_p[cut], self.min_p[cut], self.seed[cut], self.filtered
        )
