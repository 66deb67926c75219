"""Rounds whose law is known: hidden quality that drifts along a block, and a head that sees it through noise."""

from collections.abc import Callable

import torch
from torch import Tensor

from training.rounds import Rounds

Head = Callable[[Tensor], Tensor]


def drifting(
    count: int,
    *,
    seed: int,
    block: int = 5,
    level: float = -0.2,
    noise: float = 0.9,
    scale: float = 1.6,
    shift: float = 0.9,
) -> Rounds:
    """Each position's true logit is level + 1.5 q, q an autoregressive quality; the head reads scale · it + shift.

    With noise the product of exactly calibrated confidences is not calibrated: later positions know of earlier ones.
    """
    random = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=random)

    quality, alive, accepted, logits = normal(), torch.ones(count, dtype=torch.bool), torch.zeros(count), []
    for _ in range(block):
        quality = 0.8 * quality + 0.6 * normal()
        truth = level + 1.5 * quality
        logits.append(scale * (truth + noise * normal()) + shift)
        alive &= torch.rand(count, generator=random) < truth.sigmoid()
        accepted += alive
    return rounds_of(torch.stack(logits, 1), accepted.long())


def rounds_of(logits: Tensor, accepted: Tensor, drafted: Tensor | None = None) -> Rounds:
    """Rounds, ten a text."""
    number = torch.arange(len(accepted))
    whole = torch.full_like(accepted, logits.shape[1])
    return Rounds(logits.float(), accepted, whole if drafted is None else drafted, number // 10, number % 10 + 1)
