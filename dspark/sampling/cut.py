"""Filters that reach beyond the head: cut the tail of one row's weights without sorting the row.

Tokens are counted into buckets by the upper half of their weight's bits, hundredths apart. The bucket in which the
limit falls is sorted; all above it stay, all below it go. Amounts are whole numbers (mass in units of 2**-44), whose
sums are exact in float64 in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dspark.sampling.order import best_first
from dspark.sampling.scratch import scratch

__all__ = ["Limit", "cut"]

_SHIFT = 16
_BUCKETS = 1 << (31 - _SHIFT)  # weights are not negative
_MASS_UNITS = 2.0**44


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of a row's tail stays: the one field that is set counts."""

    tokens: int | None = None
    """So many tokens."""
    mass: float | None = None
    """Tokens until their weights sum to this, more than 0, the last one included."""
    least: float | None = None
    """Tokens of at least this weight."""


def cut(weights: torch.Tensor, logits: torch.Tensor, limit: Limit) -> None:
    """Set the weights of what does not stay to 0: most likely tokens stay first, equal logits by lower id.

    Args:
        weights: float32 (width,), at most 1 in sum, 0 for what is no part of the tail; changed in place.
        logits: float32 (width,).
        limit: what stays.
    """
    if limit.least is not None:
        _keep_above(weights, np.nextafter(np.float32(limit.least), np.float32(0)))
        return
    amounts = scratch.take("amounts", 1, len(weights), weights.device, torch.float64)[0].copy_(weights)
    if limit.tokens is not None:
        _cut_at(weights, logits, amounts.sign_(), limit.tokens)
    elif limit.mass is not None:
        _cut_at(weights, logits, amounts.mul_(_MASS_UNITS).round_(), limit.mass * _MASS_UNITS)


def _cut_at(weights: torch.Tensor, logits: torch.Tensor, amounts: torch.Tensor, bound: float) -> None:
    """Keep tokens while the amounts before them sum to less than `bound`."""
    buckets = scratch.take("buckets", 1, len(weights), weights.device, torch.int32)[0]
    torch.bitwise_right_shift(weights.view(torch.int32), _SHIFT, out=buckets)
    above = torch.bincount(buckets, weights=amounts, minlength=_BUCKETS).flip(0).cumsum(0)
    place = int(torch.searchsorted(above, bound))
    if place >= _BUCKETS:
        return
    bucket = _BUCKETS - 1 - place
    ids = (buckets == bucket).nonzero().flatten()
    ids = ids[best_first(logits[ids], ids)]
    before = above[place] - amounts[ids].sum() + amounts[ids].cumsum(0) - amounts[ids]
    _keep_above(weights, np.int32((bucket << _SHIFT) - 1).view(np.float32) if bucket else np.float32(0))
    weights[ids[before >= bound]] = 0.0


def _keep_above(weights: torch.Tensor, bound: np.float32) -> None:
    torch.nn.functional.threshold(weights, float(bound), 0.0, inplace=True)
