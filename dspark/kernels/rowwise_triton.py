"""Row-wise kernels in Triton: RMSNorm, residual sum with norm, rotary embedding, and the way of queries and keys.

Same signatures and meaning as in `reference` and `fused`. One program a row (or a row's head): the order of a sum is
that of one block as wide as the row, so a row's bits depend on nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dspark.kernels.attention import copy_rows
from dspark.kernels.attention_triton import PagedPlan
from dspark.kernels.parts_triton import block_of, narrow, rows_of

__all__ = ["add_norm", "norm_rotary", "norm_rotary_write", "rms_norm", "rotary"]

_HEADS = 8  # of one row in one program


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
    x, weight, cos, sin, out, storage, slots, eps, half, row_stride, heads, out_heads, turned, head_stride,
    has_norm: tl.constexpr, writes: tl.constexpr, block_heads: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: those below `turned` are normed and rotated, the others (values) pass as they are.

    Heads below `out_heads` go to `out`, the others, with `writes`, to their slots in `storage`.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    at = tl.arange(0, block)
    inside = (head < heads)[:, None] & (at < half)[None, :]
    turns = inside & (head < turned)[:, None]
    low_at = head[:, None] * 2 * half + at[None, :]
    low = tl.load(x + row * row_stride + low_at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + row * row_stride + low_at + half, mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        scale = _scale(tl.sum(low * low, 1) + tl.sum(high * high, 1), 2 * half, eps)
        scale = tl.where(head < turned, scale, 1.0)[:, None]
        low = low * scale * tl.load(weight + low_at, mask=turns, other=1.0)
        high = high * scale * tl.load(weight + low_at + half, mask=turns, other=1.0)
    c = tl.where(turns, tl.load(cos + row * half + at, mask=at < half, other=0.0)[None, :], 1.0)
    s = tl.where(turns, tl.load(sin + row * half + at, mask=at < half, other=0.0)[None, :], 0.0)
    dtype = out.dtype.element_ty
    turned_low = narrow(low * c - high * s, dtype)
    turned_high = narrow(high * c + low * s, dtype)
    mine = inside & (head < out_heads)[:, None]
    target = out + row * out_heads * 2 * half + low_at
    tl.store(target, turned_low, mask=mine)
    tl.store(target + half, turned_high, mask=mine)
    if writes:
        kept = inside & (head >= out_heads)[:, None]
        slot = tl.load(slots + row) * 2 * half
        target = storage + (head - out_heads).to(tl.int64)[:, None] * head_stride + slot + at[None, :]
        tl.store(target, turned_low, mask=kept)
        tl.store(target + half, turned_high, mask=kept)


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
        _rotary_kernel[(rows, triton.cdiv(heads, _HEADS))](
            x, cos if weight is None else weight.contiguous(), cos, sin, out, out, out, eps, dim // 2, x.stride(0),
            heads, heads, heads, 0, has_norm=weight is not None, writes=False, block_heads=_HEADS,
            block=block_of(dim // 2),
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
    _rotary_kernel[(rows, triton.cdiv(all_heads, _HEADS))](
        qkv, weight, cos, sin, out, storage, plan.slots, eps, dim // 2, qkv.stride(0), all_heads,
        heads, turned, storage.stride(0), has_norm=True, writes=True, block_heads=_HEADS, block=block_of(dim // 2),
    )  # fmt: skip
    copy_rows(storage, plan.copied, dim)
    return out


def _heads_together(x: torch.Tensor) -> torch.Tensor:
    """Such that a row's heads, x (rows, heads, D), lie side by side; rows may be any distance apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
