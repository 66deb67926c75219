"""Keyed noise on a GPU: the same bits as `dspark.kernels.noise`, which specifies them, by Triton's own Philox."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.noise import common_shape

__all__ = ["keyed_bits"]

BLOCK = 1024


# Triton itself reads a kernel's annotations, and has none for pointers.
@triton.jit  # type: ignore[untyped-decorator]
def _keyed_bits_kernel(seeds, items, positions, streams, out, count, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    at = tl.program_id(0) * block + tl.arange(0, block)
    inside = at < count
    seed = tl.load(seeds + at, mask=inside, other=0)
    item = tl.load(items + at, mask=inside, other=0).to(tl.uint32)
    position = tl.load(positions + at, mask=inside, other=0).to(tl.uint32)
    stream = tl.load(streams + at, mask=inside, other=0).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, item, position, stream, tl.zeros_like(item))
    tl.store(out + at, word.to(tl.int64) & 0xFFFFFFFF, mask=inside)


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
