"""Attention of a flattened ragged batch over paged keys and values, by code compiled for the processor.

Rows in float32 take it; for others the plan and the attention are torch's. Every row reads the pages of its sequence
where they lie: see `attend_llvm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.kernels import attend_llvm, team
from dspark.kernels import attention as plain
from dspark.kernels.attend_llvm import AttendArguments, Heads
from dspark.kernels.attention import AttentionPlan, Span

__all__ = ["RowPlan", "Rows", "attend", "paged_attention", "plan_attention"]

_ROOM_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """What rows see: the keys `first` … `last`, both (rows,), on the pages that `tables` (rows,) points to.

    `pages` are what is pointed to; `rooms` (threads, group, room) float32 is where a row's scores are kept.
    """

    first: torch.Tensor
    last: torch.Tensor
    tables: torch.Tensor
    pages: torch.Tensor
    rooms: torch.Tensor

    @classmethod
    def of(
        cls, first: torch.Tensor, last: torch.Tensor, before: torch.Tensor | int, pages: torch.Tensor, group: int
    ) -> Rows:
        """Rows whose page tables begin `before` entries into `pages`."""
        keys = int((last - first).max()) + 1
        room = (keys // _ROOM_MULTIPLE + 2) * _ROOM_MULTIPLE
        tables = torch.zeros_like(last) + before * pages.element_size() + pages.data_ptr()
        return cls(first, last, tables, pages, torch.empty(torch.get_num_threads(), group, room))


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What all layers of one group share in one step.

    `slots` (rows,) are page · page_size + offset of each row's own key and value.
    """

    slots: torch.Tensor
    rows: Rows
    page_size: int


def plan_attention(
    spans: Sequence[Span], *, page_size: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> RowPlan | AttentionPlan:
    """As `attention.plan_attention`."""
    if dtype != torch.float32:
        return plain.plan_attention(spans, page_size=page_size, window=window, group=group, dtype=dtype, device=device)
    counts = torch.tensor([span.count for span in spans])
    starts = torch.tensor([span.start - span.first_row for span in spans])
    sizes = torch.tensor([0, *(len(span.pages) for span in spans)])
    pages = torch.tensor([page for span in spans for page in span.pages])
    owners = torch.repeat_interleave(torch.arange(len(spans)), counts)
    last = torch.arange(len(owners)) + starts[owners]
    behind = sizes.cumsum(0)[owners]  # pages of the sequences before
    first = torch.zeros_like(last) if window is None else (last - (window - 1)).clamp_(min=0)
    slots = pages[behind + last // page_size] * page_size + last % page_size
    return RowPlan(slots, Rows.of(first, last, behind, pages, group), page_size)


def paged_attention(
    q: torch.Tensor, storage: torch.Tensor, plan: RowPlan | AttentionPlan, scale: float
) -> torch.Tensor:
    """As `attention.paged_attention`."""
    if isinstance(plan, AttentionPlan):
        return plain.paged_attention(q, storage, plan, scale)
    count, heads, dim = q.shape
    out = q.new_empty(count, heads * dim)
    code = attend_llvm.compiled(Heads(heads // (len(storage) // 2), dim, plan.page_size))
    attend(code.function, q.contiguous(), storage, plan.rows, scale, out)
    return out


def attend(function: int, q: torch.Tensor, storage: torch.Tensor, rows: Rows, scale: float, out: torch.Tensor) -> None:
    """Fill `out` (rows, heads · D) by a compiled attention."""
    addresses = (tensor.data_ptr() for tensor in (q, storage, out, rows.first, rows.last, rows.tables))
    sizes = len(q), len(storage) // 2, storage.stride(0)
    rooms = rows.rooms.data_ptr(), rows.rooms.shape[2]
    team.run(function, AttendArguments(*addresses, *sizes, scale, *rooms, 0, 0))
