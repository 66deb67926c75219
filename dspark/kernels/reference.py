"""Torch reference of the small row-wise kernels: RMSNorm, rotary embedding, and the two in one for queries and keys.

These are the specification and the CPU path. Every one computes in float32 and rounds once at the end, and a row's
bits do not depend on the other rows.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension: x / sqrt(mean(x²) + eps) · weight.

    `x` (..., d) of any floating dtype, `weight` float32, broadcastable to x (Gemma's added 1 is already in it);
    the result has x's dtype.
    """
    return _normalised(x, weight, eps).to(x.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) by their angle.

    `x` (rows, heads, D); `cos` and `sin` (rows, 1, D/2) float32; the result has x's shape and dtype.
    """
    return _rotated(x.float(), cos, sin).to(x.dtype)


def norm_rotary(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`rotary(rms_norm(x))` with one rounding: what queries and keys go through.

    `x` (rows, heads, D), `weight` (heads, D) float32, `cos` and `sin` (rows, 1, D/2) float32.
    """
    return _rotated(_normalised(x, weight, eps), cos, sin).to(x.dtype)


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = (wide * wide).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
