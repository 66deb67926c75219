"""Torch reference of what faster kernels do in one pass: a residual sum with its norm, queries and keys on their way.

Each is nothing but its parts from `reference` and `attention`, one after another, so that a CPU's bits are those of the
parts. They stand apart because a model says *what* belongs together and a kernel decides whether it does it at once.
"""

from __future__ import annotations

import torch

from dspark.kernels.attention import AttentionPlan, write_rows
from dspark.kernels.reference import norm_rotary, rms_norm

__all__ = ["add_norm", "norm_rotary_write"]


def add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, y_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual sum and its RMSNorm: s = x + y and rms_norm(s); with `y_weight`, s = x + rms_norm(y) (Gemma 3).

    `x` and `y` (rows, d) of one floating dtype, weights (d,) float32. y's norm and s are each rounded to the dtype.
    """
    total = x + (y if y_weight is None else rms_norm(y, y_weight, eps))
    return total, rms_norm(total, weight, eps)


def norm_rotary_write(
    qkv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    storage: torch.Tensor,
    plan: AttentionPlan,
) -> torch.Tensor:
    """`norm_rotary` of queries and keys; keys and values go into their pages, the queries (rows, heads, D) come back.

    `qkv` (rows, heads + 2 · kv_heads, D), `weight` (heads + kv_heads, D) float32, `cos` and `sin` (rows, 1, D/2)
    float32; `storage` (2 · kv_heads, pages, page_size · D) of qkv's dtype, written at `plan.slots`.
    """
    turned = weight.shape[0]
    heads = turned - storage.shape[0] // 2
    qk = norm_rotary(qkv[:, :turned], weight, eps, cos, sin)
    write_rows(storage, plan, qk[:, heads:], qkv[:, turned:])
    return qk[:, :heads]
