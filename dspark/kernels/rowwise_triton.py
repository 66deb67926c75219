"""Row-wise kernels in Triton: RMSNorm, residual sum with norm, rotary embedding, and the way of queries and keys.

Same signatures and meaning as in `reference` and `fused`. One program a row (or a row's head): the order of a sum is
that of one block as wide as the row, so a row's bits depend on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.attention_triton import PagedPlan
from dspark.kernels.parts_triton import block_of, narrow, rows_of

__all__ = ["add_norm", "norm_rotary", "norm_rotary_write", "rms_norm", "rotary"]


@triton.jit
def _scale(square_sum, width, eps):
    return tl.math.rsqrt(square_sum / width + eps)


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, width, weight_rows, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    wide = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + (row % weight_rows) * width + at, mask=inside, other=0.0)
    y = wide * _scale(tl.sum(wide * wide, 0), width, eps) * w
    tl.store(out + row * width + at, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_kernel(x, y, y_weight, weight, total, out, eps, width, has_y_norm: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    dtype = out.dtype.element_ty
    added = tl.load(y + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if has_y_norm:
        added = added * _scale(tl.sum(added * added, 0), width, eps) * tl.load(y_weight + at, mask=inside, other=0.0)
        added = narrow(added, dtype).to(tl.float32)
    s = narrow(tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32) + added, dtype)
    tl.store(total + row * width + at, s, mask=inside)
    s = s.to(tl.float32)
    s = s * _scale(tl.sum(s * s, 0), width, eps) * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row * width + at, narrow(s, dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    x, weight, cos, sin, out, storage, slots, eps, half, row_stride, out_heads, turned, head_stride,
    has_norm: tl.constexpr, writes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One head of one row. Heads below `out_heads` go to `out`, others (with `writes`) to their slots in `storage`."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, block)
    inside = at < half
    source = x + row * row_stride + head * 2 * half
    low = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + at, mask=inside, other=0.0).to(tl.float32)
    if head < turned:
        if has_norm:
            scale = _scale(tl.sum(low * low, 0) + tl.sum(high * high, 0), 2 * half, eps)
            low = low * scale * tl.load(weight + head * 2 * half + at, mask=inside, other=0.0)
            high = high * scale * tl.load(weight + head * 2 * half + half + at, mask=inside, other=0.0)
        c = tl.load(cos + row * half + at, mask=inside, other=0.0)
        s = tl.load(sin + row * half + at, mask=inside, other=0.0)
        turned_low = low * c - high * s
        high = high * c + low * s
        low = turned_low
    dtype = out.dtype.element_ty
    if writes:
        if head >= out_heads:
            target = storage + (head - out_heads) * head_stride + tl.load(slots + row) * 2 * half
            tl.store(target + at, narrow(low, dtype), mask=inside)
            tl.store(target + half + at, narrow(high, dtype), mask=inside)
    if head < out_heads:
        target = out + (row * out_heads + head) * 2 * half
        tl.store(target + at, narrow(low, dtype), mask=inside)
        tl.store(target + half + at, narrow(high, dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference.rms_norm`; the weight has x's last dimensions."""
    rows, out = rows_of(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    width = x.shape[-1]
    if len(rows):
        _rms_norm_kernel[(len(rows),)](
            rows, weight.contiguous(), out, eps, width, weight.numel() // width, block=block_of(width)
        )
    return out


def add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, y_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.add_norm`."""
    x, y = rows_of(x), rows_of(y)
    total, out = torch.empty_like(x), torch.empty_like(x)
    if len(x):
        _add_norm_kernel[(len(x),)](
            x,
            y,
            weight if y_weight is None else y_weight,
            weight,
            total,
            out,
            eps,
            x.shape[1],
            has_y_norm=y_weight is not None,
            block=block_of(x.shape[1]),
        )
    return total, out


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `reference.rotary`."""
    return _turned(x, None, 0.0, cos, sin)


def norm_rotary(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """As `reference.norm_rotary`."""
    return _turned(x, weight, eps, cos, sin)


def _turned(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    x = _heads_together(x)
    rows, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        _rotary_kernel[(rows, heads)](
            x, cos if weight is None else weight.contiguous(), cos, sin, out, out, out, eps, dim // 2, x.stride(0),
            heads, heads, 0, has_norm=weight is not None, writes=False, block=block_of(dim // 2),
        )  # fmt: skip
    return out


def norm_rotary_write(
    qkv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    storage: torch.Tensor,
    plan: PagedPlan,
) -> torch.Tensor:
    """As `fused.norm_rotary_write`: norm, rotation and the write into pages in one launch."""
    qkv = _heads_together(qkv)
    rows, all_heads, dim = qkv.shape
    turned = weight.shape[0]
    heads = turned - storage.shape[0] // 2
    out = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    _rotary_kernel[(rows, all_heads)](
        qkv, weight, cos, sin, out, storage, plan.slots, eps, dim // 2, qkv.stride(0),
        heads, turned, storage.stride(0), has_norm=True, writes=True, block=block_of(dim // 2),
    )  # fmt: skip
    return out


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """x (rows, heads, D) such that a row's heads lie side by side; rows may be any distance apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
