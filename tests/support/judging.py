"""Rows to judge, what could have been drafted for them, and verdicts that have to be alike."""

import random
from collections.abc import Sequence

import pytest
import torch

from dspark.messages import SparseDistribution
from services.verifier.candidates import Outcome


def assert_same(found: Sequence[Outcome], expected: Sequence[Outcome]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.accepted, one.token, type(one.error)) == (other.accepted, other.token, type(other.error))
        assert str(one.error) == str(other.error)
        for own, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert [t.token_id for t in (own.chosen, *own.top)] == [t.token_id for t in (theirs.chosen, *theirs.top)]
            numbers = [t.logprob for t in (theirs.chosen, *theirs.top)]
            assert [t.logprob for t in (own.chosen, *own.top)] == pytest.approx(numbers, abs=1e-5)


def make_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread).to(dtype)


def make_draft(chance: random.Random, row: torch.Tensor) -> tuple[int, SparseDistribution]:
    """A likely token most of the time, and something it can have been drawn from."""
    likely = row.float().topk(5).indices.tolist()
    token = chance.choice([likely[0], likely[0], *likely, chance.randrange(len(row))])
    others = [x for x in likely if x != token][: chance.randint(0, 4)]
    weights = [chance.random() + 0.01 for _ in (token, *others)]
    return token, SparseDistribution((token, *others), tuple(w / sum(weights) for w in weights))
