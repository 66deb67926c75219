"""From a batch of sequences to the rows of a loss: anchors, labels, the target's distributions.

A block anchored at position a predicts tokens a+1 … a+n; the target's distribution for token a+k is read from its final
hidden state at position a+k-1. Leaves the loss itself to `training.losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark.models.drafters import DSparkDrafter
from training.features import Batch


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Predictions of s·a blocks of n tokens, each tensor (s, a, n, …).

    `logits` over the draft vocabulary, `confidence` logits, `target` probabilities over the draft vocabulary, `labels`
    draft-vocabulary indices or -1, `valid` whether the row predicts a token of the sequence.
    """

    logits: Tensor
    confidence: Tensor
    target: Tensor
    labels: Tensor
    valid: Tensor


def sample_anchors(batch: Batch, count: int, generator: torch.Generator) -> Tensor:
    """(s, count) anchor positions, uniform over the response but its last token."""
    first, last = batch.prompt_lengths[:, None], batch.lengths[:, None] - 1
    uniform = torch.rand(len(batch.lengths), count, generator=generator)
    return (first + (uniform * (last - first)).long()).clamp(max=batch.lengths[:, None] - 2)


def every_anchor(batch: Batch) -> tuple[Tensor, Tensor]:
    """Each response position but the last, (s, a), and whether it is one (the rest is padding)."""
    count = int((batch.lengths - 1 - batch.prompt_lengths).max())
    anchors = batch.prompt_lengths[:, None] + torch.arange(count)
    return torch.minimum(anchors, batch.lengths[:, None] - 2), anchors < batch.lengths[:, None] - 1


def block_rows(drafter: DSparkDrafter, batch: Batch, anchors: Tensor) -> BlockRows:
    """Run the drafter on blocks at `anchors` (s, a), each fed the sequence's own tokens."""
    (s, a), n = anchors.shape, drafter.config.block_size
    hidden = drafter.training_hidden(batch.captured, batch.token_ids, anchors)
    before = anchors[..., None] + torch.arange(n)  # positions of x_{k-1}, and of the hidden state that predicts x_k
    valid = before + 1 < batch.lengths[:, None, None]
    before = torch.minimum(before, batch.lengths[:, None, None] - 2)
    previous = _pick(batch.token_ids, before).view(s * a, n)
    latents = drafter.head.unroll(previous, hidden.view(s * a, n, -1)).view(s, a, n, -1)
    logits = drafter.base_logits(hidden) + drafter.head.markov_w2(latents)
    assert drafter.confidence_head is not None
    confidence = drafter.confidence_head(hidden, drafter.head.previous(previous).view(s, a, n, -1))
    return BlockRows(
        logits=logits,
        confidence=confidence,
        target=_target_probabilities(drafter, batch, before),
        labels=_labels(drafter, _pick(batch.token_ids, before + 1)),
        valid=valid,
    )


def _pick(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows (s, t) at positions (s, a, n)."""
    return rows.gather(1, positions.flatten(1)).view(positions.shape)


def _labels(drafter: DSparkDrafter, tokens: Tensor) -> Tensor:
    rows = drafter.head.rows
    if rows is None:
        return tokens
    labels = rows[tokens]
    return torch.where(labels < drafter.config.draft_vocab_size, labels, -1)


@torch.no_grad()
def _target_probabilities(drafter: DSparkDrafter, batch: Batch, positions: Tensor) -> Tensor:
    """p_t over the draft vocabulary at positions (s, a, n), computed once a position however many blocks need it."""
    t = batch.token_ids.shape[1]
    flat = (positions + t * torch.arange(len(positions))[:, None, None]).flatten()
    unique, inverse = torch.unique(flat, return_inverse=True)
    logits = functional.linear(batch.hidden.flatten(0, 1)[unique], drafter.head_weight.to(batch.hidden.dtype))
    logits = logits.float() - batch.logz.flatten()[unique][:, None]
    return logits.exp_()[inverse].view(*positions.shape, -1)
