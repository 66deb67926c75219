"""Filters that reach beyond the head: cut the tail of one row's weights without sorting the row.

Tokens are counted into buckets by the upper half of their logit's ordered bits, which for bfloat16 logits is the whole
logit. The bucket in which the limit falls is sorted; all above it stay, all below it go. Amounts are whole numbers
(mass in units of 2**-44), whose sums are exact in float64 in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.sampling.order import best_first, ordered_bits
from dspark.sampling.scratch import scratch

__all__ = ["Limit", "cut"]

_BUCKETS = 1 << 16
_MASS_UNITS = 2.0**44


@dataclass(frozen=True, slots=True)
class Limit:
    """How much of a row's tail stays: the one field that is set counts."""

    tokens: int | None = None
    """So many tokens."""
    mass: float | None = None
    """Tokens until their weights sum to this, the last one included."""
    least: float | None = None
    """Tokens of at least this weight."""


def cut(weights: torch.Tensor, logits: torch.Tensor, head: torch.Tensor, limit: Limit) -> None:
    """Set the weights of what does not stay to 0: most likely tokens stay first, equal logits by lower id.

    Args:
        weights: float32 (width,), at most 1 in sum, 0 for the head; changed in place.
        logits: float32 (width,).
        head: int64 ids that are not part of the tail.
        limit: what stays.
    """
    if limit.least is not None:
        weights.masked_fill_(weights < limit.least, 0.0)
        return
    amounts = scratch.take("amounts", 1, len(weights), weights.device, torch.float64)[0]
    if limit.tokens is not None:
        bound = float(limit.tokens)
        amounts.fill_(1.0)[head] = 0.0
    else:
        assert limit.mass is not None
        bound = limit.mass * _MASS_UNITS
        torch.mul(weights, _MASS_UNITS, out=amounts).round_()
    buckets = (ordered_bits(logits) >> 16).add_(_BUCKETS // 2)
    _cut_at(weights, logits, amounts, buckets, bound)


def _cut_at(
    weights: torch.Tensor, logits: torch.Tensor, amounts: torch.Tensor, buckets: torch.Tensor, bound: float
) -> None:
    """Keep tokens while the amounts before them sum to less than `bound`."""
    above = torch.bincount(buckets, weights=amounts, minlength=_BUCKETS).flip(0).cumsum(0)
    place = int(torch.searchsorted(above, bound))
    if place >= _BUCKETS:
        return
    bucket = _BUCKETS - 1 - place
    before = float(above[place - 1]) if place else 0.0
    ids = (buckets == bucket).nonzero().flatten()
    ids = ids[best_first(logits[ids], ids)]
    running = amounts[ids].cumsum(0) - amounts[ids] + before
    weights.masked_fill_(buckets < bucket, 0.0)
    weights[ids[running >= bound]] = 0.0
