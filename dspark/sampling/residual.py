"""The draw that follows a rejection: from max(0, p - q), renormalised, by inverse cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark.kernels.logits import block_sums
from dspark.messages import SparseDistribution
from dspark.sampling.choice import pick
from dspark.sampling.drafted import padded
from dspark.sampling.processed import Law

__all__ = ["residual"]


def residual(
    law: Law,
    rows: torch.Tensor,
    drafted: Sequence[SparseDistribution],
    uniforms: torch.Tensor,
    otherwise: torch.Tensor,
) -> torch.Tensor:
    """One token for each of some rows of a law, given what the drafter could have proposed there.

    Args:
        law: laws of all rows.
        rows: int64 (n,), the rows where a draft token fell.
        drafted: q of each, distinct ids.
        uniforms: float64 (n,) in (0, 1).
        otherwise: int64 (n,), taken where p - q is nowhere positive: p equals q up to rounding, and the draft token
            fell by rounding.

    Returns:
        int64 (n,) token ids.
    """
    ids, q = padded(drafted, law.ids.device)
    probability = law.unit[rows] / law.total[rows]
    weights = law.joined(rows)
    left = (weights.gather(1, ids) * probability - q).clamp_(min=0.0) / probability
    weights.scatter_(1, ids, left.float())
    sums = block_sums(weights)
    some = (sums[:, -1] > 0.0).nonzero().flatten()
    tokens = otherwise.clone()
    tokens[some] = pick(weights, sums[some], some, uniforms[some])
    return tokens
