"""A block's attention in Triton: all sequences of a batch in one launch, each over its own context where it lies.

Contexts are tensors of their own, so the kernel is given their addresses. A tile's keys are its context, in splits of
`SPLIT` positions, and behind the last of them the span's own rows, which are read from the batch and written behind the
context in passing. What a row comes to depends on its own span alone (`dspark.kernels.attention_triton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark.errors import InternalError
from dspark.kernels.attention_triton import KEY_BLOCK, SPLIT, join_splits, partial_buffers, stages_of, tile_rows
from dspark.kernels.parts_triton import block_of, narrow, product, softmax_step
from dspark.kernels.rowwise_triton import norm_rotary
from services.draft.context import ContextKV, ContextMemory, ContiguousKV
from services.draft.kernels.attention import Span, injected, turned_attention

__all__ = ["TritonBlockPlan", "attend", "block_attention", "inject", "plan_block"]

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class TritonBlockPlan:
    """What all layers share in one forward.

    `tiles` (tiles, 6) int32 as in a `PagedPlan` (start and page table are 0); `places` (tiles, 6) int64: address of the
    context's K/V, its room, keys before the span, the tile's first row in the span, the span's first row, its rows.
    `items` (items, 2) int32: tile, split. `joined` are the tiles of several splits. `spans` keep the contexts alive.
    """

    spans: Sequence[Span]
    tiles: Tensor
    places: Tensor
    items: Tensor
    joined: Tensor
    partials: int
    group: int
    causal: bool


def plan_block(spans: Sequence[Span], *, causal: bool, group: int) -> TritonBlockPlan:
    """As `attention.plan_block`."""
    most = tile_rows(group) // group
    tiles: list[tuple[int, ...]] = []
    places, items, joined, partials, first_row = [], [], [], 0, 0
    for span in spans:
        assert isinstance(span.context, ContiguousKV)
        rows = span.context.layer_rows()
        before = span.context.length + span.at
        if before + span.count > rows.shape[2]:
            raise InternalError(f"{before + span.count} rows in a context with room for {rows.shape[2]}")
        splits = max(1, -(-before // SPLIT))
        for first in range(0, span.count, most):
            items += [(len(tiles), split) for split in range(splits)]
            joined += [len(tiles)] * (splits > 1)
            tiles.append((first_row + first, 0, min(most, span.count - first), 0, partials, splits))
            places.append((rows.data_ptr(), rows.shape[2], before, first, first_row, span.count))
            partials += splits * (splits > 1)
        first_row += span.count
    device = spans[0].context.layer_rows().device
    return TritonBlockPlan(
        spans=spans,
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        places=torch.tensor(places, dtype=torch.int64, device=device),
        items=torch.tensor(items, dtype=torch.int32, device=device),
        joined=torch.tensor(joined, dtype=torch.int32, device=device),
        partials=partials,
        group=group,
        causal=causal,
    )


@triton.jit
def _block_attention_kernel(
    q, own_keys, own_values, out, partial_acc, partial_best, partial_mass, tiles, places, items, scale, layer,
    q_stride, k_stride, v_stride, kv_heads, causal: tl.constexpr, group: tl.constexpr, dim: tl.constexpr,
    dtype: tl.constexpr, block_rows: tl.constexpr, block_dim: tl.constexpr, block_keys: tl.constexpr,
    split_keys: tl.constexpr,
):  # fmt: skip
    """One split of one tile, for one key/value head."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    tile, split = tl.load(items + 2 * item), tl.load(items + 2 * item + 1)
    first_row, count = tl.load(tiles + 6 * tile), tl.load(tiles + 6 * tile + 2)
    partial, splits = tl.load(tiles + 6 * tile + 4), tl.load(tiles + 6 * tile + 5)
    place = places + 6 * tile
    room, before, first = tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    span_row, span_count = tl.load(place + 4), tl.load(place + 5)
    context = tl.load(place).to(tl.pointer_type(dtype)) + (layer * 2 * kv_heads + kv_head) * room * dim
    values_at = kv_heads * room * dim

    m, d = tl.arange(0, block_rows), tl.arange(0, block_dim)
    token, head = m // group, kv_head * group + m % group
    own = (token < count)[:, None] & (d < dim)[None, :]
    row = (first_row + token).to(tl.int64)
    query = tl.load(q + row[:, None] * q_stride + head[:, None] * dim + d[None, :], mask=own, other=0.0)
    best = tl.full((block_rows,), float("-inf"), tl.float32)
    mass = tl.zeros((block_rows,), tl.float32)
    acc = tl.zeros((block_rows, block_dim), tl.float32)

    end = tl.minimum((split + 1) * split_keys, before)
    for first_key in range(split * split_keys, end, block_keys):
        key = first_key + tl.arange(0, block_keys)
        present = (key < end)[:, None] & (d < dim)[None, :]
        at = context + key.to(tl.int64)[:, None] * dim + d[None, :]
        k = tl.load(at, mask=present, other=0.0)
        scores = product(query, tl.trans(k), tl.zeros((block_rows, block_keys), tl.float32)) * scale
        scores = tl.where((key < end)[None, :], scores, float("-inf"))
        best, mass, acc = softmax_step(scores, tl.load(at + values_at, mask=present, other=0.0), best, mass, acc, dtype)

    if split == splits - 1:
        for first_key in range(0, span_count, block_keys):
            key = first_key + tl.arange(0, block_keys)
            present = (key < span_count)[:, None] & (d < dim)[None, :]
            k_row, within = (span_row + key)[:, None], kv_head * dim + d[None, :]
            k = tl.load(own_keys + k_row * k_stride + within, mask=present, other=0.0)
            v = tl.load(own_values + k_row * v_stride + within, mask=present, other=0.0)
            scores = product(query, tl.trans(k), tl.zeros((block_rows, block_keys), tl.float32)) * scale
            seen = (key < span_count)[None, :] & (token < count)[:, None]
            if causal:
                seen = seen & (key[None, :] <= (first + token)[:, None])
            best, mass, acc = softmax_step(tl.where(seen, scores, float("-inf")), v, best, mass, acc, dtype)
            # This tile's own rows go behind the context, where later rows will look for them.
            mine = present & ((key >= first) & (key < first + count))[:, None]
            at = context + (before + key).to(tl.int64)[:, None] * dim + d[None, :]
            tl.store(at, k, mask=mine)
            tl.store(at + values_at, v, mask=mine)

    if splits == 1:
        acc = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
        target = out + (row * kv_heads * group + head)[:, None] * dim + d[None, :]
        tl.store(target, narrow(acc, out.dtype.element_ty), mask=own)
    else:
        slot = ((partial + split).to(tl.int64) * kv_heads + kv_head) * block_rows + m
        tl.store(partial_best + slot, best)
        tl.store(partial_mass + slot, mass)
        tl.store(partial_acc + slot[:, None] * block_dim + d[None, :], acc)


def block_attention(query: Tensor, keys: Tensor, values: Tensor, plan: TritonBlockPlan, layer: int) -> Tensor:
    """As `attention.block_attention`."""
    query, keys, values = (_heads_together(rows) for rows in (query, keys, values))
    (rows, heads, dim), kv_heads = query.shape, keys.shape[1]
    out = torch.empty(rows, heads * dim, dtype=query.dtype, device=query.device)
    shape = {"group": plan.group, "dim": dim, "block_rows": tile_rows(plan.group), "block_dim": block_of(dim)}
    partials = partial_buffers(plan.partials * kv_heads, shape["block_rows"], shape["block_dim"], query.device)
    _block_attention_kernel[(len(plan.items), kv_heads)](
        query, keys, values, out, *partials, plan.tiles, plan.places, plan.items, dim**-0.5, layer,
        query.stride(0), keys.stride(0), values.stride(0), kv_heads, causal=plan.causal, dtype=_TYPES[query.dtype],
        **shape, block_keys=KEY_BLOCK, split_keys=SPLIT, num_stages=stages_of(query.dtype, dim),
    )  # fmt: skip
    if plan.partials:
        join_splits[(len(plan.joined), kv_heads)](
            out, *partials, plan.tiles, plan.joined, kv_heads, 0, **shape, split_keys=SPLIT
        )
    return out


def _heads_together(x: Tensor) -> Tensor:
    """Rows (n, heads, D) whose heads lie side by side; rows may be any distance apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def inject(
    projected: Tensor, weights: Sequence[Tensor], eps: float, rotary: Sequence[tuple[Tensor, Tensor]],
    memory: ContextMemory, pieces: Sequence[tuple[ContextKV, int]],
) -> None:  # fmt: skip
    """As `attention.inject`."""
    del memory
    injected(norm_rotary, projected, weights, eps, rotary, pieces)


def attend(
    qkv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, memory: ContextMemory, plan: TritonBlockPlan,
    layer: int,
) -> Tensor:  # fmt: skip
    """As `attention.attend`."""
    del memory
    return turned_attention(norm_rotary, block_attention, qkv, weight, eps, cos, sin, plan, layer)
