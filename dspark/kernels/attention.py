"""Attention of a flattened ragged batch over paged keys and values, and the plan that its layers share.

A plan is made once per batch and layer group. It cuts every sequence's rows into tiles of at most `TILE_ROWS` query
rows (a token has one query row per head of its key/value group) and puts tiles of like shape into one bucket: one
product per bucket, whatever the number of sequences.

A row's bits do not depend on the batch because every shape that a reduction's order depends on is a function of the
row's position alone: tiles do not cross multiples of `KEY_BLOCK` positions, and take their keys in whole blocks up to
the next multiple, the rest masked. What is left is the number of query rows and of tiles: torch's fused attention takes
rows 32 at a time (64 from 192 on), so tiles are filled up to a multiple of 32 in float32, where some rows' bits depend
on that number. In bf16 on a CPU attention is two plain batched products of oneDNN, bit-equal from 4 to 128 rows and 1
to 24 tiles; tiles are filled up to 8, 16, 32 … rows so that few shapes occur. Measured with torch 2.13; over more or
fewer masked keys some rows differ in both.

The two products take 57 µs a tile of 16 rows over 640 keys where the fused one takes 104: that one calls oneDNN four
times for each tile. Scores are rounded to bf16 in between, which does not show: the mean KL divergence of Gemma 3 270M
from float32 over 700 tokens is 0.00094 against 0.00081.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from dspark.kernels.linear import fast_bf16

KEY_BLOCK = 128
TILE_ROWS = 128
ROW_MULTIPLES = {torch.float32: 32}
ROW_MULTIPLE = 8
NULL_PAGE = 0
"""A page that belongs to nobody; what is read from it is always masked."""


@dataclass(frozen=True, slots=True)
class Span:
    """Rows first_row … first_row + count - 1 of a batch: one sequence's positions start … start + count - 1.

    `pages[i]` holds the keys and values of positions i · page_size … With an `origin`, whose pages these are, the page
    of `start` is the span's own: what lies before `start` in it comes from the origin's, layer by layer.
    """

    first_row: int
    start: int
    count: int
    pages: Sequence[int]
    origin: Sequence[int] = ()

    def copied(self, page_size: int) -> list[tuple[int, int]]:
        """Slots, page · page_size + offset, from and to which keys and values are copied."""
        page, offset = divmod(self.start, page_size)
        if not self.origin:
            return []
        return [(self.origin[page] * page_size + at, self.pages[page] * page_size + at) for at in range(offset)]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tiles that go through one product: `tiles` of `width` tokens each over `length` keys.

    `rows` (tiles · width,) are the batch rows of the tiles, None where they are all rows in order; a short tile repeats
    its last row. `valid` picks the tiles' own rows among them and `target` says which batch rows they are.
    `pages` has the key pages of every tile, or of one where `shared`. `mask` (tiles, width · group, length) is added to
    the scores. `room` is where layer after layer gathers its keys and values: fresh memory for each would cost more in
    page faults than the copy.
    """

    tiles: int
    width: int
    length: int
    shared: bool
    rows: torch.Tensor | None
    valid: torch.Tensor
    target: torch.Tensor
    pages: torch.Tensor
    mask: torch.Tensor
    room: list[torch.Tensor] = field(default_factory=list)

    def gather(self, storage: torch.Tensor) -> torch.Tensor:
        """(2 · kv_heads, key pages, page_size · D) of a layer's storage; the next call overwrites it."""
        if not self.room:
            self.room.append(storage.new_empty(storage.shape[0], len(self.pages), storage.shape[2]))
        return torch.index_select(storage, 1, self.pages, out=self.room[0])


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of one group share in one step: where to write keys and values, and what to read.

    `slots` (rows,) are page · page_size + offset of each row's own key and value. As soon as these are written, what
    lies at the slots copied[0] is copied to copied[1], both (any,); None: nothing.
    """

    slots: torch.Tensor
    buckets: tuple[Bucket, ...]
    copied: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class _Tile:
    first_row: int
    start: int
    count: int
    first_key: int
    length: int
    pages: Sequence[int]
    owner: int


def plan_attention(
    spans: Sequence[Span], *, page_size: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> AttentionPlan:
    """Plan for spans that cover a batch's rows in order; `group` query heads share a key/value head.

    With a `window` W, position p sees p - W + 1 … p, else all of 0 … p.
    """
    slots = [
        span.pages[position // page_size] * page_size + position % page_size
        for span in spans
        for position in range(span.start, span.start + span.count)
    ]
    unit = _unit(group, dtype)
    most = max(unit, TILE_ROWS // group // unit * unit)
    shapes: dict[tuple[int, ...], list[_Tile]] = {}
    for owner, span in enumerate(spans):
        for tile in _tiles(span, owner, window, most):
            width = min(most, unit << (-(-tile.count // unit) - 1).bit_length())
            alone = (tile.first_key, owner) if span.count > most else ()
            shapes.setdefault((width, tile.length, *alone), []).append(tile)
    buckets = [_bucket(tiles, shape[0], page_size, window, group, dtype, device) for shape, tiles in shapes.items()]
    if len(buckets) == 1 and buckets[0].tiles * buckets[0].width == len(slots):
        buckets = [replace(buckets[0], rows=None)]  # no tile was filled up, so the rows are the batch's in order
    return AttentionPlan(torch.tensor(slots, device=device), tuple(buckets), copies(spans, page_size, device))


def copies(spans: Sequence[Span], page_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`AttentionPlan.copied` of some spans."""
    pairs = [pair for span in spans for pair in span.copied(page_size)]
    if not pairs:
        return None
    source, to = zip(*pairs, strict=True)
    return torch.tensor(source, device=device), torch.tensor(to, device=device)


def _unit(group: int, dtype: torch.dtype) -> int:
    """Tokens come in multiples of this, so that a tile's query rows are a multiple of what the dtype asks for."""
    multiple = ROW_MULTIPLES.get(dtype, ROW_MULTIPLE)
    return multiple // math.gcd(multiple, group)


def _tiles(span: Span, owner: int, window: int | None, most: int) -> Iterable[_Tile]:
    start, end = span.start, span.start + span.count
    while start < end:
        block = start // KEY_BLOCK * KEY_BLOCK
        count = min(most, end - start, block + KEY_BLOCK - start)
        first_key = 0 if window is None else max(0, block - window + 1) // KEY_BLOCK * KEY_BLOCK
        length = block + KEY_BLOCK - first_key
        yield _Tile(span.first_row + start - span.start, start, count, first_key, length, span.pages, owner)
        start += count


def _bucket(
    tiles: list[_Tile],
    width: int,
    page_size: int,
    window: int | None,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Bucket:
    first = tiles[0]
    shared = len(tiles) > 1 and all((t.owner, t.first_key) == (first.owner, first.first_key) for t in tiles)
    rows = [t.first_row + min(i, t.count - 1) for t in tiles for i in range(width)]
    kept = [n * width + i for n, t in enumerate(tiles) for i in range(t.count)]
    pages = [page for tile in tiles[: 1 if shared else None] for page in _key_pages(tile, page_size)]
    return Bucket(
        tiles=len(tiles),
        width=width,
        length=first.length,
        shared=shared,
        rows=torch.tensor(rows, device=device),
        valid=torch.tensor(kept, device=device),
        target=torch.tensor([rows[i] for i in kept], device=device),
        pages=torch.tensor(pages, device=device),
        mask=_mask(tiles, width, window, group, dtype, device),
    )


def _key_pages(tile: _Tile, page_size: int) -> list[int]:
    first, count = tile.first_key // page_size, tile.length // page_size
    pages = list(tile.pages[first : first + count])
    return pages + [NULL_PAGE] * (count - len(pages))


def _mask(
    tiles: list[_Tile], width: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """0 where a row sees a key, -inf elsewhere: (tiles, width · group, length)."""
    position = torch.tensor([[t.start + min(i, t.count - 1) - t.first_key for i in range(width)] for t in tiles])
    position = position.to(device)[:, :, None]
    key = torch.arange(tiles[0].length, device=device)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return mask.repeat_interleave(group, 1)


def paged_attention(q: torch.Tensor, storage: torch.Tensor, plan: AttentionPlan, scale: float) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v for every row of a batch.

    `q` (rows, heads, D); `storage` (2 · kv_heads, pages, page_size · D), keys before values, of q's dtype. Query head
    h reads key/value head h // (heads / kv_heads). Returns (rows, heads · D), contiguous.
    """
    heads = q.shape[1]
    if len(plan.buckets) == 1:
        bucket = plan.buckets[0]
        result = _attend(q, storage, bucket, scale)
        return result if bucket.rows is None else result.index_select(0, bucket.valid)
    result = torch.empty(q.shape[0], heads * q.shape[2], dtype=q.dtype, device=q.device)
    for bucket in plan.buckets:
        rows = _attend(q, storage, bucket, scale)
        result.index_copy_(0, bucket.target, rows.index_select(0, bucket.valid))
    return result


def _attend(q: torch.Tensor, storage: torch.Tensor, bucket: Bucket, scale: float) -> torch.Tensor:
    """Attention of one bucket: (tiles · width, heads · D)."""
    heads, dim = q.shape[1], q.shape[2]
    kv_heads = storage.shape[0] // 2
    rows = q if bucket.rows is None else q.index_select(0, bucket.rows)
    folded = rows.reshape(bucket.tiles, bucket.width, kv_heads, heads // kv_heads, dim).permute(2, 0, 1, 3, 4)
    folded = folded.reshape(kv_heads, bucket.tiles, -1, dim)
    keys, values = bucket.gather(storage).view(2, kv_heads, -1, bucket.length, dim)
    attend = _products if q.dtype == torch.bfloat16 and fast_bf16(q.device) else _fused
    result = attend(folded, keys, values, bucket.mask, scale)
    result = result.view(kv_heads, bucket.tiles, bucket.width, heads // kv_heads, dim).permute(1, 2, 0, 3, 4)
    return result.reshape(bucket.tiles * bucket.width, heads * dim)


def _products(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale · q keysᵀ + mask) values: q (kv_heads, tiles, n, D), keys and values (kv_heads, 1 or tiles, …)."""
    count = keys.shape[0] * keys.shape[1]  # one product a head and tile, or a head where all tiles read the same keys
    mask = mask.view(keys.shape[1], -1, mask.shape[-1])
    if keys.shape[0] > 1:
        mask = mask.repeat(keys.shape[0], 1, 1)
    scores = torch.baddbmm(mask, q.reshape(count, -1, q.shape[-1]), keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1))


def _fused(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """As `_products`, by the library's fused attention."""
    keys, values = (rows.expand(-1, q.shape[1], -1, -1) for rows in (keys, values))
    return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None], scale=scale)


def write_rows(storage: torch.Tensor, plan: AttentionPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put a batch's keys and values, each (rows, kv_heads, D), where the plan says."""
    kv_heads, dim = keys.shape[1], keys.shape[2]
    slots = storage.view(storage.shape[0], -1, dim)
    slots[:kv_heads].index_copy_(1, plan.slots, keys.transpose(0, 1))
    slots[kv_heads:].index_copy_(1, plan.slots, values.transpose(0, 1))
    copy_rows(storage, plan.copied, dim)


def copy_rows(storage: torch.Tensor, copied: tuple[torch.Tensor, torch.Tensor] | None, dim: int) -> None:
    """Copy keys and values of `dim` numbers a head within a layer's storage, as `AttentionPlan.copied` says."""
    if copied is not None:
        slots = storage.view(storage.shape[0], -1, dim)
        slots.index_copy_(1, copied[1], slots.index_select(1, copied[0]))
