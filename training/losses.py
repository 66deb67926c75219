"""What a drafter is trained on: cross entropy, distance to the target's distribution, and confidence (DSpark §3.3).

Everything is over the draft vocabulary: target mass outside it can only be rejected, and counts as distance. Leaves to
others where the logits come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

CE_WEIGHT = 0.1
L1_WEIGHT = 0.9
CONFIDENCE_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class LossParts:
    """Weighted means over rows (scalars), and per row the acceptance 1 - TV (r,), which nothing flows back through."""

    total: Tensor
    cross_entropy: Tensor
    distance: Tensor
    confidence: Tensor
    acceptance: Tensor


def position_weights(block: int, decay: float, *, device: torch.device | None = None) -> Tensor:
    """exp(-(k - 1) / decay) for k = 1 … block, float32."""
    return torch.exp(-torch.arange(block, dtype=torch.float32, device=device) / decay)


def block_loss(logits: Tensor, confidence: Tensor, target: Tensor, labels: Tensor, weights: Tensor) -> LossParts:
    """0.1 CE + 0.9 L1 + 1.0 BCE, each a weighted mean over rows.

    `logits` (r, draft vocabulary); `confidence` (r,) logits; `target` (r, draft vocabulary) float32 probabilities
    of the target, which need not sum to 1; `labels` (r,) draft-vocabulary indices, -1 where the token is outside it;
    `weights` (r,) float32, 0 for rows that do not count.
    """
    cross_entropy, distance = _fused_rows(logits, target, labels)
    acceptance = (1 - 0.5 * distance.detach()).clamp(0, 1)
    bce = functional.binary_cross_entropy_with_logits(confidence.float(), acceptance, reduction="none")
    norm = weights.sum().clamp_min(1e-6)
    ce_mean, l1_mean, bce_mean = ((part * weights).sum() / norm for part in (cross_entropy, distance, bce))
    total = CE_WEIGHT * ce_mean + L1_WEIGHT * l1_mean + CONFIDENCE_WEIGHT * bce_mean
    return LossParts(total, ce_mean.detach(), l1_mean.detach(), bce_mean.detach(), acceptance)


def _fused_rows(logits: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _FusedRows.apply(logits, target, labels))  # type: ignore[no-untyped-call]


class _FusedRows(torch.autograd.Function):
    """Per row: -log p_d[label] (0 without a label), and ‖p_d - p_t‖_1 with the target's mass outside.

    Backward is written out: with p = p_d and s = sign(p_d - p_t), the gradients to the logits are p - onehot(label) and
    p ⊙ (s - p·s). Only p and s stay in memory, in the logits' dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(logits.float(), -1)
        difference = probabilities - target
        distance = difference.abs().sum(-1) + (1 - target.sum(-1)).clamp_min(0)
        known = labels >= 0
        picked = probabilities.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        cross_entropy = torch.where(known, -picked.clamp_min(1e-30).log(), 0.0)
        ctx.save_for_backward(probabilities.to(logits.dtype), difference.sign_().to(logits.dtype), labels)
        return cross_entropy, distance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probabilities, sign, labels = ctx.saved_tensors
        grad_ce, grad_l1 = (grad[:, None] for grad in grads)
        known = (labels >= 0)[:, None]
        pull = torch.einsum("rv,rv->r", probabilities, sign)[:, None]
        ce = torch.where(known, grad_ce, 0.0)
        scale = sign.mul_(grad_l1.to(sign.dtype)).add_((ce - grad_l1 * pull).to(sign.dtype))
        grad = scale.mul_(probabilities)
        grad.scatter_add_(1, labels.clamp_min(0)[:, None], -ce.to(grad.dtype))
        return grad, None, None
