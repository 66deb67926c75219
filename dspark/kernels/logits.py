"""Torch reference of the passes over whole rows of logits: a copy with block maxima, and weights with block sums.

A row of 262k logits is a megabyte: how often it is touched is what sampling costs. What maxima and weights are for is
`dspark.sampling`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["BLOCK", "MAX_SCALE", "TORCH_LOGITS", "LogitKernels", "block_sums", "gather", "weigh"]

BLOCK = 64
"""Tokens a block: rows are searched, and summed, by blocks."""

_SHORT = 8192
MAX_SCALE = 1e30  # keeps 1 / temperature and its inverse finite in float32, where 0 * inf would be NaN


@dataclass(frozen=True, slots=True)
class LogitKernels:
    """One implementation of these passes."""

    gather: Callable[[torch.Tensor, Sequence[int], torch.Tensor], torch.Tensor]
    weigh: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def gather(logits: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """Copy rows of logits and find the greatest value of each block.

    Args:
        logits: bfloat16 or float32 (any, vocabulary).
        rows: n of them.
        values: float32 (n, width), overwritten; width is a multiple of `BLOCK`. -inf is put past the vocabulary.

    Returns:
        float32 (n, width / BLOCK); NaN where a block has one.
    """
    vocab = logits.shape[1]
    if vocab < _SHORT or logits.is_cuda:
        values[:, :vocab] = logits[torch.tensor(rows, device=logits.device)]
    else:  # a gathered copy in between would cost more, in page faults, than all that follows
        for into, row in zip(values, rows, strict=True):
            into[:vocab] = logits[row]
    values[:, vocab:] = -torch.inf
    return values.view(len(rows), -1, BLOCK).amax(-1)


def weigh(
    values: torch.Tensor, ids: torch.Tensor, temperature: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights exp(value / temperature) of all tokens but some, in a unit of each row's own.

    Args:
        values: float32 (rows, width) of sound logits.
        ids: int64 (rows, n), the greatest first, whose weights become 0.
        temperature: float64 (rows, 1).
        weights: float32 (rows, width), overwritten; no row sums to more than 1.

    Returns:
        The unit, float64 (rows, 1): what a weight is multiplied by to make that of `ids[:, 0]` one; and the running
        sums of weights over blocks, float64 (rows, width / BLOCK).
    """
    scale = scale_of(temperature)
    scaled = values if bool((scale == 1.0).all()) else torch.mul(values, scale, out=weights)
    torch.softmax(scaled, -1, out=weights)
    unit = weights.gather(1, ids[:, :1]).double().reciprocal()
    weights.scatter_(1, ids, 0.0)
    return unit, block_sums(weights)


def scale_of(temperature: torch.Tensor) -> torch.Tensor:
    """float32 (rows, 1): what logits are multiplied by."""
    return temperature.reciprocal().clamp(1 / MAX_SCALE, MAX_SCALE).float()


def block_sums(weights: torch.Tensor) -> torch.Tensor:
    """float64 (rows, blocks): running sums of float32 weights (rows, width) over blocks; the last is the total."""
    return weights.view(len(weights), -1, BLOCK).sum(-1).double().cumsum(-1)


TORCH_LOGITS = LogitKernels(gather, weigh)
