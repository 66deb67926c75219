"""From a batch of texts to the rows of a loss: anchors, labels, the target's distributions.

A block anchored at position a predicts tokens a+1 … a+n; the target's distribution for token a+k is read from its final
hidden state at position a+k-1. Leaves the loss itself to `training.losses`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark.models.drafters import Drafter, Hints
from training.states import Batch

__all__ = ["BlockRows", "anchors_at", "arithmetic_of", "block_rows", "sample_anchors"]


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Predictions of s·a blocks of n tokens, each tensor (s, a, n, …).

    `logits` over the draft vocabulary, `confidence` logits where the drafter has any, `target` probabilities over the
    draft vocabulary, `labels` draft-vocabulary indices or -1, `valid` whether the row predicts a token of the text.
    """

    logits: Tensor
    confidence: Tensor | None
    target: Tensor
    labels: Tensor
    valid: Tensor


def sample_anchors(batch: Batch, count: int, generator: torch.Generator) -> Tensor:
    """(s, count) anchor positions, uniform over the response but its last token."""
    return anchors_at(batch, torch.rand(len(batch.lengths), count, generator=generator))


def anchors_at(batch: Batch, shares: Tensor) -> Tensor:
    """(s, a) anchor positions, as far into each response but its last token as `shares` (s, a) in [0, 1) say."""
    first, last = batch.prompt_lengths[:, None], batch.lengths[:, None] - 1
    return (first + (shares.to(first.device) * (last - first)).long()).minimum(batch.lengths[:, None] - 2)


def arithmetic_of(drafter: Drafter) -> torch.autocast:
    """What blocks are computed under: products in bfloat16 where the output head is, else plain float32."""
    head = drafter.head_weight
    return torch.autocast(head.device.type, torch.bfloat16, enabled=head.dtype == torch.bfloat16)


def block_rows(drafter: Drafter, batch: Batch, anchors: Tensor, length: int | None = None) -> BlockRows:
    """Run the drafter on blocks of `length` tokens, by default its own, at `anchors` (s, a), fed the text's own."""
    hints = None if batch.hints is None else _hints_at(batch.hints, anchors)
    hidden = drafter.training_hidden(batch.captured, batch.token_ids, anchors, length, hints)
    s, a, n, _ = hidden.shape
    # Positions of x_{k-1}, and of the hidden state that predicts x_k.
    before = anchors[..., None] + torch.arange(n, device=anchors.device)
    valid = before + 1 < batch.lengths[:, None, None]
    before = torch.minimum(before, batch.lengths[:, None, None] - 2)
    previous, flat = _pick(batch.token_ids, before).view(s * a, n), hidden.reshape(s * a, n, -1)
    logits, bias = drafter.base_logits(hidden), drafter.sequential_logits(previous, flat)
    confidence = drafter.confidences(previous, flat)
    return BlockRows(
        logits=logits if bias is None else logits + bias.view(logits.shape),
        confidence=None if confidence is None else confidence.view(s, a, n),
        target=_target_probabilities(drafter, batch, before),
        labels=_labels(drafter, _pick(batch.token_ids, before + 1)),
        valid=valid,
    )


def _hints_at(hints: Hints, anchors: Tensor) -> Hints:
    """Hints (s, t, n) and (s, t) for blocks at anchors (s, a)."""
    places = anchors[..., None].expand(-1, -1, hints.tokens.shape[-1])
    return Hints(hints.tokens.gather(1, places), hints.kinds.gather(1, anchors))


def _pick(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows (s, t) at positions (s, a, n)."""
    return rows.gather(1, positions.flatten(1)).view(positions.shape)


def _labels(drafter: Drafter, tokens: Tensor) -> Tensor:
    if drafter.rows is None:
        return tokens
    labels = drafter.rows[tokens]
    return torch.where(labels < drafter.config.draft_vocab_size, labels, -1)


@torch.no_grad()
def _target_probabilities(drafter: Drafter, batch: Batch, positions: Tensor) -> Tensor:
    """p_t over the draft vocabulary at positions (s, a, n).

    On a CPU once a position however many blocks need it; a card multiplies in less time than it finds out.
    """
    t = batch.token_ids.shape[1]
    flat = (positions + t * torch.arange(len(positions), device=positions.device)[:, None, None]).flatten()
    if flat.device.type != "cpu":
        return _probabilities_at(drafter, batch, flat).view(*positions.shape, -1)
    unique, inverse = torch.unique(flat, return_inverse=True)
    return _probabilities_at(drafter, batch, unique)[inverse].view(*positions.shape, -1)


def _probabilities_at(drafter: Drafter, batch: Batch, flat: Tensor) -> Tensor:
    logits = functional.linear(batch.hidden.flatten(0, 1)[flat], drafter.head_weight.to(batch.hidden.dtype))
    return (logits.float() - batch.logz.flatten()[flat][:, None]).exp_()
