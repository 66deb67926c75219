"""What lies before and behind a tap's projection, by code compiled for the processor: a pass of norms each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.kernels.rowwise_llvm import rms_norm
from services.verifier.kernels import features

__all__ = ["tap_inputs", "tap_outputs"]


def tap_inputs(states: Sequence[Tensor], eps: float | None) -> Tensor:
    """As `features.tap_inputs`."""
    if eps is None or states[0].dtype != torch.float32:
        return features.tap_inputs(states, eps)
    rows, width = states[0].shape
    return rms_norm(torch.cat(list(states), 1).view(-1, width), torch.ones(width), eps).view(rows, len(states) * width)


def tap_outputs(projected: Tensor, bias: Tensor | None, norm: Tensor, eps: float) -> Tensor:
    """As `features.tap_outputs`."""
    return rms_norm(projected if bias is None else projected + bias, norm, eps).to(torch.bfloat16)
