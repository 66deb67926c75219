"""What lies before and behind a tap's projection, in Triton: one launch a layer, and one for the norm.

The projection itself stays the shared linear. Inside it, rows would be normalised again for every tile of
outputs; beside it, they are one pass over n · m · hidden numbers against d times as many multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark.kernels.parts_triton import block_of, narrow

__all__ = ["tap_inputs", "tap_outputs"]


@triton.jit
def _unit_kernel(state, out, eps, width, state_stride, out_stride, unit: tl.constexpr, block: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    x = tl.load(state + n * state_stride + at, mask=at < width, other=0.0).to(tl.float32)
    if unit:
        x = x * tl.math.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(out + n * out_stride + at, x, mask=at < width)


@triton.jit
def _norm_kernel(projected, bias, norm, out, eps, width, biased: tl.constexpr, block: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    x = tl.load(projected + n * width + at, mask=at < width, other=0.0)
    if biased:
        x += tl.load(bias + at, mask=at < width, other=0.0)
    x = x * tl.math.rsqrt(tl.sum(x * x, 0) / width + eps) * tl.load(norm + at, mask=at < width, other=0.0)
    tl.store(out + n * width + at, narrow(x, out.dtype.element_ty), mask=at < width)


def tap_inputs(states: Sequence[Tensor], eps: float | None) -> Tensor:
    """As `features.tap_inputs`."""
    rows, width = states[0].shape
    out = torch.empty(rows, len(states) * width, dtype=torch.float32, device=states[0].device)
    for index, state in enumerate(states):
        if rows:
            _unit_kernel[(rows,)](
                state, out[:, index * width :], eps or 0.0, width, state.stride(0), out.stride(0),
                unit=eps is not None, block=block_of(width),
            )  # fmt: skip
    return out


def tap_outputs(projected: Tensor, bias: Tensor | None, norm: Tensor, eps: float) -> Tensor:
    """As `features.tap_outputs`."""
    out = torch.empty(projected.shape, dtype=torch.bfloat16, device=projected.device)
    if len(projected):
        _norm_kernel[(len(projected),)](
            projected, norm if bias is None else bias, norm, out, eps, projected.shape[1], biased=bias is not None,
            block=block_of(projected.shape[1]),
        )  # fmt: skip
    return out
