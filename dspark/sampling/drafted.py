"""What a drafter says it could have proposed: checks, look-ups and tensors of sparse distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dspark.messages import SparseDistribution

__all__ = ["certain", "flaw", "padded", "share"]

_SUM_TOLERANCE = 1e-3


def certain(token: int) -> SparseDistribution:
    """The distribution of a token that was proposed without one."""
    return SparseDistribution((token,), (1.0,))


def flaw(drafted: SparseDistribution, token: int, vocab: int) -> str | None:
    """Why this is no distribution from which the token can have been drawn; None where it is one."""
    ids, probabilities = drafted.token_ids, drafted.probabilities
    if len(ids) != len(probabilities):
        return f"{len(ids)} token ids and {len(probabilities)} probabilities"
    if len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= vocab:
        return f"token ids must be distinct and inside the vocabulary of {vocab}"
    if min(probabilities) < 0.0 or not abs(math.fsum(probabilities) - 1.0) <= _SUM_TOLERANCE:  # not: NaN too
        return "probabilities must not be negative and must sum to 1"
    if token not in ids or probabilities[ids.index(token)] == 0.0:
        return f"token {token} cannot have been drawn from its distribution"
    return None


def share(drafted: SparseDistribution, token: int) -> float:
    """The probability q of one of its tokens, renormalised."""
    return drafted.probabilities[drafted.token_ids.index(token)] / sum(drafted.probabilities)


def padded(drafted: Sequence[SparseDistribution], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 and renormalised probabilities float64 (n, longest), short rows repeating their first pair."""
    longest = max(len(d.token_ids) for d in drafted)
    ids = [[*d.token_ids, *d.token_ids[:1] * (longest - len(d.token_ids))] for d in drafted]
    shares = [[*d.probabilities, *d.probabilities[:1] * (longest - len(d.probabilities))] for d in drafted]
    sums = torch.tensor([[sum(d.probabilities)] for d in drafted], dtype=torch.float64, device=device)
    return torch.tensor(ids, device=device), torch.tensor(shares, dtype=torch.float64, device=device) / sums
