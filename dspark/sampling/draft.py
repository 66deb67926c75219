"""The drafter's choice: one draft token a sequence from its sequential head's logits (DSpark §3.1).

A draft may be chosen in any way as long as the verifier knows how: coupled mode shares the target's noise to agree
with it often, rejection mode ships exactly the truncated distribution it drew from. So both look at the drafter's most
likely tokens only, and apply the request's filters to what those hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from dspark.kernels.noise import KeyedBits, Stream, gumbel, keyed_bits, streams, uniform
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.sampling.processed import kept
from dspark.sampling.rows import SamplingRows

__all__ = ["Choice", "DraftChooser"]


@dataclass(frozen=True, eq=False)
class Choice:
    """One draft token a sequence."""

    tokens: torch.Tensor
    """int64 (b,) target token ids."""
    draft_index: torch.Tensor
    """int64 (b,) indices into the draft vocabulary."""
    distributions: list[SparseDistribution | None]
    """In rejection mode (and temperature > 0) what the token was drawn from, over target ids; else None."""
    others: torch.Tensor
    """int64 (b,) what the token would have been next, with the same noise, in coupled mode; else the token itself."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """What stays the same while a block is drafted; bool tensors (b,)."""

    rows: SamplingRows
    greedy: torch.Tensor
    rejection: torch.Tensor
    any_coupled: bool
    any_rejection: bool


@lru_cache(maxsize=64)
def _batch(samplings: tuple[Sampling, ...], device: torch.device) -> _Batch:
    greedy = [s.greedy for s in samplings]
    rejection = [s.mode is Mode.REJECTION and not s.greedy for s in samplings]
    coupled = [not g and not r for g, r in zip(greedy, rejection, strict=True)]
    flags = torch.tensor([greedy, rejection], device=device)
    return _Batch(SamplingRows.of(samplings, device), flags[0], flags[1], any(coupled), any(rejection))


class DraftChooser:
    """Chooses draft tokens. Stateless; one may serve any number of sequences and threads."""

    def __init__(self, *, draft_top_k: int = 64, bits: KeyedBits = keyed_bits) -> None:
        """`draft_top_k` most likely draft tokens take part in a choice at temperature > 0.

        Over Zipf-like distributions of 8,192 tokens, 32 / 64 / 128 / all of them give an acceptance of .72 / .73 /
        .74 / .75 in rejection mode and .65 / .67 / .68 / .69 in coupled mode at an entropy of 2.9 nats. At 2.1 nats
        64 lose less than .01, at 3.8 about .05.
        """
        self._top_k = draft_top_k
        self._bits = bits

    @property
    def top_k(self) -> int:
        """How many of the most likely draft tokens take part in a choice at temperature > 0."""
        return self._top_k

    @torch.no_grad()
    def choose(
        self,
        logits: torch.Tensor,
        samplings: Sequence[Sampling],
        positions: torch.Tensor,
        d2t: torch.Tensor | None = None,
        *,
        committed: torch.Tensor | None = None,
    ) -> Choice:
        """One draft token for each sequence.

        Args:
            logits: bfloat16 or float32 (b, draft vocabulary) of the sequential head.
            samplings: b settings.
            positions: int64 (b,), of the tokens being drafted.
            d2t: int64 (draft vocabulary,), target id = index + d2t[index]; None where the vocabularies are one.
            committed: int64 (b,), the round's committed length N. Keys rejection mode's noise beside the position, so
                that a verify length planned from an earlier round's confidences stays independent of these drafts;
                without it only the present round's may be used (DSpark Appendix A).

        Returns:
            The choice.
        """
        batch = _batch(tuple(samplings), logits.device)
        if not (batch.any_coupled or batch.any_rejection):
            index = logits.max(-1).indices
            tokens = index if d2t is None else index + d2t[index]
            return Choice(tokens, index, [None] * len(index), tokens)
        values, indices = logits.topk(min(self._top_k, logits.shape[1]), -1)
        ids = indices if d2t is None else indices + d2t[indices]
        log_weights = _log_weights(values, batch.rows)
        committed = torch.zeros_like(positions) if committed is None else committed
        drawn = self._draw(batch, log_weights, ids, positions.unsqueeze(-1), committed.unsqueeze(-1))
        at, other = (found.unsqueeze(-1) for found in drawn)
        tokens, index = (t.gather(1, at).squeeze(-1) for t in (ids, indices))
        return Choice(tokens, index, _distributions(batch, ids, log_weights), ids.gather(1, other).squeeze(-1))

    def _draw(
        self,
        batch: _Batch,
        log_weights: torch.Tensor,
        ids: torch.Tensor,
        positions: torch.Tensor,
        committed: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the listed tokens each sequence drafts, and would have drafted next: int64 (b,)."""
        items = torch.cat((ids, committed), 1) if batch.any_coupled else committed
        of = streams(items.shape[1] - 1, Stream.DRAFT, device=ids.device)
        bits = self._bits(batch.rows.seed, items, positions, of)
        nothing = torch.zeros_like(batch.greedy, dtype=torch.int64)
        coupled, other = _two_best(log_weights + gumbel(bits[:, :-1])) if batch.any_coupled else (nothing, nothing)
        drawn = coupled
        if batch.any_rejection:
            running = log_weights.exp().cumsum(-1)
            drawn = torch.searchsorted(running, uniform(bits[:, -1:]) * running[:, -1:], right=True).squeeze(-1)
        at = torch.where(batch.greedy, 0, torch.where(batch.rejection, drawn, coupled))
        return at, torch.where(batch.greedy | batch.rejection, at, other)


def _two_best(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the greatest score of each row, and of the next one; the greatest's again where all others are -inf."""
    best = scores.argmax(-1)
    others = scores.scatter(1, best.unsqueeze(-1), -torch.inf).max(-1)
    return best, torch.where(others.values == -torch.inf, best, others.indices)


def _log_weights(values: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """float64 log weights of logits (b, k), most likely first, relative to the first; -inf where a filter cuts."""
    values = values.double()
    log_weights = (values - values[:, :1]) / rows.temperature
    if rows.filtered:
        stays = kept(log_weights.exp(), rows, torch.zeros_like(rows.top_p))
        log_weights = log_weights.masked_fill(~stays, -torch.inf)
    return log_weights


def _distributions(batch: _Batch, ids: torch.Tensor, log_weights: torch.Tensor) -> list[SparseDistribution | None]:
    if not batch.any_rejection:
        return [None] * len(ids)
    shares = log_weights.softmax(-1).tolist()
    sizes = (log_weights > -torch.inf).sum(-1).tolist()
    return [
        SparseDistribution(tuple(i[:size]), tuple(p[:size])) if wanted else None
        for i, p, size, wanted in zip(ids.tolist(), shares, sizes, batch.rejection.tolist(), strict=True)
    ]
