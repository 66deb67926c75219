"""Torch reference of what lies before and behind a tap's projection W_c (DSpark §2.2); float32 throughout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["tap_inputs", "tap_outputs"]


def tap_inputs(states: Sequence[Tensor], eps: float | None) -> Tensor:
    """M layers' states side by side, float32 (n, m · hidden); with `eps` each layer's brought to RMS 1.

    `states`: (n, hidden) of the model's dtype each.
    """
    picked = torch.stack(list(states), 1).float()
    return (picked if eps is None else _unit_rms(picked, eps)).flatten(1)


def tap_outputs(projected: Tensor, bias: Tensor | None, norm: Tensor, eps: float) -> Tensor:
    """RMSNorm(projected + bias), (n, d) float32 to bfloat16."""
    return (_unit_rms(projected if bias is None else projected + bias, eps) * norm).to(torch.bfloat16)


def _unit_rms(rows: Tensor, eps: float) -> Tensor:
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)
