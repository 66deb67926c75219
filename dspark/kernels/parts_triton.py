"""Device functions that several Triton kernels share, and the interpreter's differences from a compiled kernel.

Triton's interpreter (TRITON_INTERPRET=1) runs kernels on a CPU through numpy. It keeps bfloat16 as 16-bit integers:
products of them would be products of integers, and rounding to them cuts off. So there operands are widened before a
product, which loses nothing, and rounding is written out. Its products are numpy's, where a row's bits depend on its
place on some processors: in float64 they differ by less than float32 keeps.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "block_of", "narrow", "product", "softmax_step"]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"})
"""As Triton itself reads it when a kernel is declared."""


@lru_cache
def block_of(size: int, least: int = 16) -> int:
    """The power of two that holds `size` elements: blocks have no other sizes."""
    return max(least, int(triton.next_power_of_2(size)))


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """All rows of the last dimension, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 to `dtype`, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, acc):
    """Acc + a · b in float32, without tensor-float-32."""
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), out_dtype=tl.float64)
        return acc + wide.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def softmax_step(scores, values, best, mass, acc, dtype: tl.constexpr):
    """Online softmax: take one block of keys in. scores (M, N) float32, -inf where hidden; values (N, D).

    `best` (M,), `mass` (M,), `acc` (M, D): greatest score, sum of weights and weighted sum so far. A block that a row
    does not see leaves the row's bits as they were: what it is multiplied by is exactly 1, what is added exactly 0.
    """
    new = tl.maximum(best, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp(scores - shift[:, None])
    keep = tl.exp(best - shift)
    mass = mass * keep + tl.sum(weights, 1)
    acc = product(narrow(weights, dtype), values, acc * keep[:, None])
    return new, mass, acc
