"""Keyed noise on a GPU: the same bits as `dspark.kernels.noise`, which specifies them, by Triton's own Philox."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.noise import common_shape

__all__ = ["gumbel", "keyed_bits", "keyed_word", "uniform"]

BLOCK = 1024


@triton.jit
def keyed_word(seed, item, position, stream):
    """Device function: word 0 of Philox-4x32-10, int64 in [0, 2**32). `item` is a block of any integer type."""
    item = item.to(tl.uint32)
    zero = tl.zeros_like(item)
    position = zero + tl.cast(position, tl.uint32)
    word, _, _, _ = tl.philox(seed, item, position, zero + tl.cast(stream, tl.uint32), zero)
    return word.to(tl.int64) & 0xFFFFFFFF


@triton.jit
def uniform(bits):
    """Device function: float64 in (0, 1), as `noise.uniform`."""
    return (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32


@triton.jit
def gumbel(bits):
    """Device function: float64 standard Gumbel, as `noise.gumbel`."""
    return -tl.log(-tl.log(uniform(bits)))


@triton.jit
def _keyed_bits_kernel(seeds, items, positions, streams, out, count, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    seed = tl.load(seeds + at, mask=inside, other=0)
    item = tl.load(items + at, mask=inside, other=0)
    position = tl.load(positions + at, mask=inside, other=0)
    stream = tl.load(streams + at, mask=inside, other=0)
    tl.store(out + at, keyed_word(seed, item, position, stream), mask=inside)


def keyed_bits(
    seeds: torch.Tensor, items: torch.Tensor, positions: torch.Tensor, streams: torch.Tensor
) -> torch.Tensor:
    """Same signature and bits as `dspark.kernels.noise.keyed_bits`, for CUDA tensors."""
    shape = common_shape(seeds, items, positions, streams)
    operands = [t.expand(shape).contiguous() for t in (seeds, items, positions, streams)]
    out = torch.empty_like(operands[0])
    grid = (triton.cdiv(out.numel(), BLOCK),)
    _keyed_bits_kernel[grid](*operands, out, out.numel(), block=BLOCK)
    return out
