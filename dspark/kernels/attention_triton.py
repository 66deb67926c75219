"""Attention of a flattened ragged batch over paged keys and values in Triton, and its plan.

Every sequence's rows are cut into tiles of a fixed number of query rows (a token has one per head of its key/value
group), and a tile's keys into splits of `SPLIT` positions. Splits start at multiples of `SPLIT` whatever the batch is,
blocks inside them at multiples of `KEY_BLOCK`, and a tile's splits are joined in their order. Blocks that a row does
not see leave its bits as they were (`parts_triton.softmax_step`), so a row's result depends on its own keys alone, not
on its tile. Nothing is padded to the longest sequence; a long one is many programs, not one long one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dspark.kernels.attention import Span, copies
from dspark.kernels.parts_triton import block_of, narrow, product, softmax_step

__all__ = ["PagedPlan", "join_splits", "paged_attention", "plan_attention", "stages_of"]

TILE_ROWS = 32
KEY_BLOCK = 64
SPLIT = 512


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """What all layers of one group share in one step.

    `slots` (rows,) int64: where each row's own key and value go, page · page_size + offset. `pages` int32: the page
    tables one after another. `tiles` (tiles, 6) int32: first row, start position, tokens, where its page table begins,
    its first partial result or -1, number of splits. `items` (items, 2) int32: tile, split; tiles of several splits
    have `partials` partial results together, `joined` (n,) int32 are those tiles. `window` is 0 for none. `copied` as
    `attention.AttentionPlan`'s.
    """

    slots: torch.Tensor
    pages: torch.Tensor
    tiles: torch.Tensor
    items: torch.Tensor
    joined: torch.Tensor
    partials: int
    group: int
    page_size: int
    window: int
    copied: tuple[torch.Tensor, torch.Tensor] | None = None


def plan_attention(
    spans: Sequence[Span], *, page_size: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> PagedPlan:
    """As `attention.plan_attention`."""
    del dtype
    slots = [
        span.pages[position // page_size] * page_size + position % page_size
        for span in spans
        for position in range(span.start, span.start + span.count)
    ]
    tiles: list[tuple[int, ...]] = []
    items, joined, partials = [], [], 0
    table = 0
    for span in spans:
        for first_row, start, count in _tiles(span, tile_rows(group) // group):
            first, last = (max(0, start - window + 1) if window else 0) // SPLIT, (start + count - 1) // SPLIT
            splits = last - first + 1
            several = splits > 1
            items += [(len(tiles), split) for split in range(first, last + 1)]
            joined += [len(tiles)] * several
            tiles.append((first_row, start, count, table, partials - first if several else -1 << 30, splits))
            partials += splits * several
        table += len(span.pages)
    return PagedPlan(
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        pages=torch.tensor([page for span in spans for page in span.pages], dtype=torch.int32, device=device),
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        items=torch.tensor(items, dtype=torch.int32, device=device),
        joined=torch.tensor(joined, dtype=torch.int32, device=device),
        partials=partials,
        group=group,
        page_size=page_size,
        window=window or 0,
        copied=copies(spans, page_size, device),
    )


def tile_rows(group: int) -> int:
    """Query rows of a tile: one number for all batches of a model, because it may decide how a product sums."""
    return block_of(group, TILE_ROWS)


def stages_of(dtype: torch.dtype, dim: int) -> int:
    """Key blocks loaded ahead: what 100 KB of shared memory hold with bfloat16 heads of 256, and 164 with float32."""
    return 2 if dtype.itemsize * block_of(dim) <= 512 else 1


def _tiles(span: Span, most: int) -> Iterator[tuple[int, int, int]]:
    for done in range(0, span.count, most):
        yield span.first_row + done, span.start + done, min(most, span.count - done)


@triton.jit
def _attention_kernel(
    q, storage, out, partial_acc, partial_best, partial_mass, pages, tiles, items, scale,
    q_stride, head_stride, kv_heads, window, page_size, group: tl.constexpr, dim: tl.constexpr,
    block_rows: tl.constexpr, block_dim: tl.constexpr, block_keys: tl.constexpr, split_keys: tl.constexpr,
):  # fmt: skip
    """One split of one tile, for one key/value head."""
    item, kv_head = tl.program_id(0), tl.program_id(1)
    tile = tl.load(items + 2 * item)
    split = tl.load(items + 2 * item + 1)
    facts = tiles + 6 * tile
    first_row, start, count = tl.load(facts), tl.load(facts + 1), tl.load(facts + 2)
    table, partial, splits = tl.load(facts + 3), tl.load(facts + 4), tl.load(facts + 5)

    m, d = tl.arange(0, block_rows), tl.arange(0, block_dim)
    token, head = m // group, kv_head * group + m % group
    own = (token < count)[:, None] & (d < dim)[None, :]
    row = (first_row + token).to(tl.int64)
    query = tl.load(q + row[:, None] * q_stride + head[:, None] * dim + d[None, :], mask=own, other=0.0)
    position = start + token

    best = tl.full((block_rows,), float("-inf"), tl.float32)
    mass = tl.zeros((block_rows,), tl.float32)
    acc = tl.zeros((block_rows, block_dim), tl.float32)
    keys = storage + kv_head.to(tl.int64) * head_stride
    values = storage + (kv_head.to(tl.int64) + kv_heads) * head_stride
    end = tl.minimum((split + 1) * split_keys, start + count)
    begin = split * split_keys
    if window > 0:
        begin = tl.maximum(begin, tl.maximum(start - window + 1, 0) // block_keys * block_keys)
    for first_key in range(begin, end, block_keys):
        key = first_key + tl.arange(0, block_keys)
        page = tl.load(pages + table + key // page_size, mask=key < end, other=0).to(tl.int64)
        at = (page * page_size + key % page_size) * dim
        present = (key < end)[:, None] & (d < dim)[None, :]
        k = tl.load(keys + at[:, None] + d[None, :], mask=present, other=0.0)
        scores = product(query, tl.trans(k), tl.zeros((block_rows, block_keys), tl.float32)) * scale
        seen = key[None, :] <= position[:, None]
        if window > 0:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(values + at[:, None] + d[None, :], mask=present, other=0.0)
        best, mass, acc = softmax_step(scores, v, best, mass, acc, q.dtype.element_ty)

    if splits == 1:
        acc = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
        target = out + (row * kv_heads * group + head)[:, None] * dim + d[None, :]
        tl.store(target, narrow(acc, out.dtype.element_ty), mask=own)
    else:
        place = ((partial + split).to(tl.int64) * kv_heads + kv_head) * block_rows + m
        tl.store(partial_best + place, best)
        tl.store(partial_mass + place, mass)
        tl.store(partial_acc + place[:, None] * block_dim + d[None, :], acc)


@triton.jit
def join_splits(
    out, partial_acc, partial_best, partial_mass, tiles, joined, kv_heads, window, group: tl.constexpr,
    dim: tl.constexpr, block_rows: tl.constexpr, block_dim: tl.constexpr, split_keys: tl.constexpr,
):  # fmt: skip
    """The partial results of one tile and key/value head, joined in the order of its splits."""
    facts = tiles + 6 * tl.load(joined + tl.program_id(0))
    kv_head = tl.program_id(1)
    first_row, start, count = tl.load(facts), tl.load(facts + 1), tl.load(facts + 2)
    partial, splits = tl.load(facts + 4), tl.load(facts + 5)
    if window > 0:
        partial += tl.maximum(start - window + 1, 0) // split_keys
    m, d = tl.arange(0, block_rows), tl.arange(0, block_dim)
    best = tl.full((block_rows,), float("-inf"), tl.float32)
    mass = tl.zeros((block_rows,), tl.float32)
    acc = tl.zeros((block_rows, block_dim), tl.float32)
    for split in range(splits):
        place = ((partial + split).to(tl.int64) * kv_heads + kv_head) * block_rows + m
        other = tl.load(partial_best + place)
        new = tl.maximum(best, other)
        shift = tl.where(new == float("-inf"), 0.0, new)
        keep, take = tl.exp(best - shift), tl.exp(other - shift)
        mass = mass * keep + tl.load(partial_mass + place) * take
        more = tl.load(partial_acc + place[:, None] * block_dim + d[None, :])
        acc = acc * keep[:, None] + more * take[:, None]
        best = new
    acc = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
    token = m // group
    row = (first_row + token).to(tl.int64) * kv_heads * group + kv_head * group + m % group
    own = (token < count)[:, None] & (d < dim)[None, :]
    tl.store(out + row[:, None] * dim + d[None, :], narrow(acc, out.dtype.element_ty), mask=own)


def paged_attention(q: torch.Tensor, storage: torch.Tensor, plan: PagedPlan, scale: float) -> torch.Tensor:
    """As `attention.paged_attention`; q's rows may lie apart."""
    rows, heads, dim = q.shape
    q = q if q.stride(2) == 1 and q.stride(1) == dim else q.contiguous()
    kv_heads = storage.shape[0] // 2
    out = torch.empty(rows, heads * dim, dtype=q.dtype, device=q.device)
    shape = {"group": plan.group, "dim": dim, "block_rows": tile_rows(plan.group), "block_dim": block_of(dim)}
    partials = partial_buffers(plan.partials * kv_heads, shape["block_rows"], shape["block_dim"], q.device)
    _attention_kernel[(len(plan.items), kv_heads)](
        q, storage, out, *partials, plan.pages, plan.tiles, plan.items, scale, q.stride(0), storage.stride(0), kv_heads,
        plan.window, plan.page_size, **shape, block_keys=KEY_BLOCK, split_keys=SPLIT,
        num_stages=stages_of(q.dtype, dim),
    )  # fmt: skip
    if plan.partials:
        join_splits[(len(plan.joined), kv_heads)](
            out, *partials, plan.tiles, plan.joined, kv_heads, plan.window, **shape, split_keys=SPLIT
        )
    return out


def partial_buffers(count: int, rows: int, dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Weighted sums (count · rows, dim), greatest scores and masses (count · rows,) of splits, float32."""
    places = max(1, count) * rows
    return tuple(torch.empty(places, *width, dtype=torch.float32, device=device) for width in ((dim,), (), ()))
