"""What rejection sampling asks of a law: how much it shares with what was drafted, and a draw from what that leaves.

Both weigh p by w, what the tokens before are worth: 1 for the first of a block (`services.verifier.trial`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark.kernels.logits import block_sums
from dspark.messages import SparseDistribution
from dspark.sampling.choice import pick
from dspark.sampling.drafted import padded
from dspark.sampling.processed import Law

__all__ = ["met", "residual"]


def met(
    law: Law, rows: torch.Tensor, drafted: Sequence[SparseDistribution], drafts: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the target and the drafter make of some rows' draft tokens.

    Args:
        law: laws of all rows.
        rows: int64 (n,).
        drafted: q of each, distinct ids, the draft token among them.
        drafts: int64 (n, 1).
        kept: float64 (n, 1), w in (0, 1].

    Returns:
        float64 (n,) each: p and q of the draft tokens, and the sums over all tokens of min(w p, q).
    """
    ids, q = padded(drafted, law.ids.device)
    p = law.weights_of(ids, rows) / law.total[rows]
    places = torch.arange(ids.shape[1], device=ids.device)
    own = places < places.new_tensor([[len(one.token_ids)] for one in drafted])
    both = torch.where(own, torch.minimum(p * kept, q), 0.0).cumsum(-1)[:, -1]
    at = (ids == drafts).long().argmax(-1, keepdim=True)
    return p.gather(1, at)[:, 0], q.gather(1, at)[:, 0], both


def residual(
    law: Law,
    rows: torch.Tensor,
    drafted: Sequence[SparseDistribution],
    kept: torch.Tensor,
    uniforms: torch.Tensor,
    otherwise: torch.Tensor,
) -> torch.Tensor:
    """One token for each of some rows of a law, drawn from max(0, w p - q), renormalised, by inverse cumulation.

    Args:
        law: laws of all rows.
        rows: int64 (n,), the rows behind the last draft tokens that stand.
        drafted: q of each, distinct ids.
        kept: float64 (n, 1), w in (0, 1].
        uniforms: float64 (n,) in (0, 1).
        otherwise: int64 (n,), taken where w p - q is nowhere positive: w p equals q up to rounding, and the draft
            token fell by rounding.

    Returns:
        int64 (n,) token ids.
    """
    ids, q = padded(drafted, law.ids.device)
    probability = law.unit[rows] / law.total[rows]
    weights = law.joined(rows)
    left = (weights.gather(1, ids) * probability - q / kept).clamp_(min=0.0) / probability
    weights.scatter_(1, ids, left.float())
    sums = block_sums(weights)
    some = (sums[:, -1] > 0.0).nonzero().flatten()
    tokens = otherwise.clone()
    tokens[some] = pick(weights, sums[some], some, uniforms[some])
    return tokens
