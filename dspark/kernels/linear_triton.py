"""Linear layers in Triton whose rows keep their bits whatever else is in the batch.

A library product picks its kernel by the number of rows, and with it the order of its sums. Here tiles have one shape
for every batch and the sum over inputs runs through blocks of `BLOCK_IN` in order, never split: a row meets the same
operations in the same order alone and among a thousand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.linear import Activation, Linear
from dspark.kernels.parts_triton import block_of, narrow, product

__all__ = ["gated", "linear"]

BLOCK_ROWS, BLOCK_OUT, BLOCK_IN = 32, 64, 64
_ACTIVATIONS = {"gelu_tanh": 1, "silu": 2}


@triton.jit
def _active(x, activation: tl.constexpr):
    if activation == 1:  # gelu, tanh approximation; tanh(z) = 2 sigmoid(2z) - 1
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)
    return x * tl.sigmoid(x)


@triton.jit
def _linear_kernel(
    x, weight, other, out, rows, outs, ins, x_stride,
    activation: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr,
):  # fmt: skip
    """Into `out` x · weightᵀ, or with an `activation` activation(x · weightᵀ) * (x · otherᵀ)."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(1) * block_out + tl.arange(0, block_out)
    acc = tl.zeros((block_rows, block_out), tl.float32)
    acc_other = tl.zeros((block_rows, block_out), tl.float32)
    row_at = row.to(tl.int64)[:, None] * x_stride
    weight_at = column.to(tl.int64)[None, :] * ins
    for first in range(0, ins, block_in):
        k = first + tl.arange(0, block_in)
        inside = (k[:, None] < ins) & (column[None, :] < outs)
        a = tl.load(x + row_at + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < ins), other=0.0)
        acc = product(a, tl.load(weight + weight_at + k[:, None], mask=inside, other=0.0), acc)
        if activation:
            acc_other = product(a, tl.load(other + weight_at + k[:, None], mask=inside, other=0.0), acc_other)
    dtype = out.dtype.element_ty
    result = narrow(acc, dtype)
    if activation:
        result = narrow(_active(acc, activation), dtype).to(tl.float32) * narrow(acc_other, dtype).to(tl.float32)
        result = narrow(result, dtype)
    at = row.to(tl.int64)[:, None] * outs + column[None, :]
    tl.store(out + at, result, mask=(row[:, None] < rows) & (column[None, :] < outs))


def linear(weight: torch.Tensor) -> Linear:
    """The layer x ↦ x · weightᵀ for a weight (out, in), which is kept as it is."""
    return _TritonLinear(weight, weight, 0)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """The layer x ↦ activation(x · gateᵀ) * (x · upᵀ) in one launch; both products rounded, as the reference does."""
    return _TritonLinear(gate, up, _ACTIVATIONS[activation])


class _TritonLinear:
    def __init__(self, weight: torch.Tensor, other: torch.Tensor, activation: int) -> None:
        self._weight, self._other, self._activation = weight.contiguous(), other.contiguous(), activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        (outs, ins), rows = self._weight.shape, x.shape[0]
        out = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(outs, BLOCK_OUT))
        if rows:
            _linear_kernel[grid](
                x, self._weight, self._other, out, rows, outs, ins, x.stride(0), activation=self._activation,
                block_rows=BLOCK_ROWS, block_out=BLOCK_OUT, block_in=min(BLOCK_IN, block_of(ins)),
            )  # fmt: skip
        return out
