"""Attention of a flattened ragged batch over paged keys and values, by code compiled for the processor.

Rows in float32 take it; for others the plan and the attention are torch's. Tiles of a sequence's rows
read its pages where they lie: see `attend_llvm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.kernels import attend_dots_llvm, attend_llvm, team
from dspark.kernels import attention as plain
from dspark.kernels.attend_llvm import AttendArguments, Heads
from dspark.kernels.attention import AttentionPlan, Span, copies

__all__ = ["Ints", "RowPlan", "Rows", "attend", "paged_attention", "plan_attention"]

Ints: TypeAlias = NDArray[np.int64]
"""Plans are made by numpy: on so few numbers each of its operations takes a fraction of torch's."""

_ROOM_MULTIPLE = 64
_TILE_ROWS = 8
_TILES = 2  # that each thread should find, where there are rows enough


@dataclass(frozen=True, slots=True)
class Rows:
    """What rows see, and the tiles they are computed in.

    Row r sees the keys `first` … `last`, both (rows,); tile t has the rows `begin` … `end` - 1 of one sequence, whose
    page numbers begin in `pages` at `tables`, all three (any,), of which `tiles` (1,) count. `rooms` (threads, tile
    rows, group, room) float32 is where scores are kept.
    """

    first: torch.Tensor
    last: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    tables: torch.Tensor
    tiles: torch.Tensor
    pages: torch.Tensor
    rooms: torch.Tensor

    @classmethod
    def of(
        cls, first: Ints, last: Ints, spans: Sequence[tuple[int, int, int]], pages: Ints, *, group: int
    ) -> Rows:  # fmt: skip
        """Rows of spans (first row, count, entries of `pages` before its own).

        Tiles are as large as leaves every thread some of them.
        """
        threads = torch.get_num_threads()
        most = min(_TILE_ROWS, max(1, len(last) // (_TILES * threads)))
        tiles = [
            (row, min(row + most, at + count), before)
            for at, count, before in spans
            for row in range(at, at + count, most)
        ]
        begin, end, tables = np.array(tiles).T.copy()
        keys = int((last[end - 1] - first[begin]).max()) + 1
        room = (keys // _ROOM_MULTIPLE + 2) * _ROOM_MULTIPLE
        rooms = torch.empty(threads, most, group, room, dtype=torch.float32)
        tensor, count = torch.from_numpy, torch.tensor([len(tiles)])
        return cls(tensor(first), tensor(last), tensor(begin), tensor(end), tensor(tables), count, tensor(pages), rooms)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What all layers of one group share in one step.

    `slots` (rows,) are page · page_size + offset of each row's own key and value. `copied` as `AttentionPlan`'s, of
    which `copies` (1,) count.
    """

    slots: torch.Tensor
    rows: Rows
    page_size: int
    copied: tuple[torch.Tensor, torch.Tensor] | None = None
    copies: torch.Tensor | None = None


def plan_attention(
    spans: Sequence[Span], *, page_size: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> RowPlan | AttentionPlan:
    """As `attention.plan_attention`."""
    if dtype != torch.float32:
        return plain.plan_attention(spans, page_size=page_size, window=window, group=group, dtype=dtype, device=device)
    before = list(accumulate((len(span.pages) for span in spans), initial=0))[:-1]
    pages = np.array([page for span in spans for page in span.pages])
    owners = np.repeat(np.arange(len(spans)), [span.count for span in spans])
    last = np.arange(len(owners)) + np.array([span.start - span.first_row for span in spans])[owners]
    first = np.zeros_like(last) if window is None else np.maximum(last - (window - 1), 0)
    slots = pages[np.array(before)[owners] + last // page_size] * page_size + last % page_size
    tiled = [(span.first_row, span.count, own) for span, own in zip(spans, before, strict=True)]
    copied = copies(spans, page_size, device)
    count = None if copied is None else torch.tensor([len(copied[0])])
    return RowPlan(torch.from_numpy(slots), Rows.of(first, last, tiled, pages, group=group), page_size, copied, count)


def paged_attention(
    q: torch.Tensor, storage: torch.Tensor, plan: RowPlan | AttentionPlan, scale: float
) -> torch.Tensor:
    """As `attention.paged_attention`; `storage` may be bfloat16 where `q` is float32."""
    if isinstance(plan, AttentionPlan):
        return plain.paged_attention(q, storage, plan, scale)
    count, heads, dim = q.shape
    out = q.new_empty(count, heads * dim)
    rounded = storage.dtype == torch.bfloat16
    function = compiled(Heads(heads // (len(storage) // 2), dim, plan.page_size, rounded))
    attend(function, q.contiguous(), storage, plan.rows, scale, out)
    return out


@lru_cache(maxsize=8)
def compiled(heads: Heads) -> int:
    """Where the attention for this processor and such heads lies."""
    return attend_dots_llvm.compiled(heads) if attend_dots_llvm.fits(heads) else attend_llvm.compiled(heads)


def attend(function: int, q: torch.Tensor, storage: torch.Tensor, rows: Rows, scale: float, out: torch.Tensor) -> None:
    """Fill `out` (rows, heads · D) by a compiled attention; q and out are contiguous, storage inside a head.

    `storage` is of the numbers that the attention was compiled for.
    """
    assert q.dtype == out.dtype == torch.float32
    tensors = q, storage, out, rows.first, rows.last, rows.begin, rows.end, rows.tables, rows.pages
    sizes = rows.tiles.data_ptr(), len(storage) // 2, storage.stride(0)
    rooms = rows.rooms.data_ptr(), rows.rooms.shape[3], rows.rooms.stride(0)
    team.run(function, AttendArguments(*(tensor.data_ptr() for tensor in tensors), *sizes, scale, *rooms, 0, 0))
