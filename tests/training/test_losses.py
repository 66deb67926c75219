"""The fused loss against the formulas as one would write them down."""

import torch
from torch.nn import functional

from training.losses import block_loss, position_weights

ROWS, VOCAB = 12, 20


def example() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, VOCAB, generator=generator, requires_grad=True)
    confidence = torch.randn(ROWS, generator=generator, requires_grad=True)
    whole = torch.softmax(torch.randn(ROWS, VOCAB + 5, generator=generator), -1)
    labels = torch.randint(-1, VOCAB, (ROWS,), generator=generator)
    labels[0] = -1
    weights = torch.rand(ROWS, generator=generator) * (torch.arange(ROWS) % 4 != 3)
    return logits, confidence, whole[:, :VOCAB], labels, weights


def plain_loss(
    logits: torch.Tensor, confidence: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros(())
    for row in range(ROWS):
        p_d = torch.softmax(logits[row], -1)
        distance = (p_d - target[row]).abs().sum() + 1 - target[row].sum()
        cross_entropy = functional.cross_entropy(logits[row], labels[row]) if labels[row] >= 0 else 0.0
        survives = (1 - 0.5 * distance).detach()
        bce = functional.binary_cross_entropy_with_logits(confidence[row], survives)
        total = total + weights[row] * (0.1 * cross_entropy + 0.9 * distance + bce)
    return total / weights.sum()


def test_value_and_gradients_equal_the_formulas() -> None:
    logits, confidence, target, labels, weights = example()
    parts = block_loss(logits, confidence, target, labels, weights)
    expected = plain_loss(logits, confidence, target, labels, weights)
    torch.testing.assert_close(parts.total, expected)
    found = torch.autograd.grad(parts.total, (logits, confidence))
    wanted = torch.autograd.grad(expected, (logits, confidence))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_acceptance_is_the_overlap_of_the_distributions() -> None:
    logits, confidence, target, labels, weights = example()
    overlap = torch.minimum(torch.softmax(logits, -1), target).sum(-1)
    torch.testing.assert_close(block_loss(logits, confidence, target, labels, weights).acceptance, overlap.detach())


def test_a_perfect_drafter_has_no_distance() -> None:
    logits, confidence, _, labels, weights = example()
    parts = block_loss(logits, confidence, torch.softmax(logits.detach(), -1), labels, weights)
    assert float(parts.distance) < 1e-5
    assert float(parts.acceptance.min()) > 1 - 1e-5


def test_later_positions_weigh_less() -> None:
    weights = position_weights(4, 4.0)
    torch.testing.assert_close(weights, torch.exp(-torch.tensor([0.0, 0.25, 0.5, 0.75])))
