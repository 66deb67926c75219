"""A block's attention by code compiled for the processor: each sequence's rows over its context where it lies.

Contexts in float32 take it; for others the plan and the attention are torch's: see `attention`. A context's rows are
one page of the shared `attend_llvm`, larger than any context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dspark.kernels import attend_llvm
from dspark.kernels.attend_llvm import Heads
from dspark.kernels.attention_llvm import Rows, attend
from services.draft.kernels import attention as plain
from services.draft.kernels.attention import BlockPlan, Span

__all__ = ["RowsPlan", "block_attention", "plan_block"]

_ONE_PAGE = 1 << 40


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """The spans that cover a forward's rows, each with the tiles of its own rows."""

    spans: Sequence[tuple[Span, Rows]]


def plan_block(spans: Sequence[Span], *, causal: bool, group: int) -> RowsPlan | BlockPlan:
    """As `attention.plan_block`."""
    if any(span.context.layer_rows().dtype != torch.float32 for span in spans):
        return plain.plan_block(spans, causal=causal, group=group)
    counts = [span.count for span in spans]
    starts = torch.tensor([span.context.length + span.at for span in spans])
    within = torch.cat([torch.arange(count) if causal else torch.full((count,), count - 1) for count in counts])
    last = starts.repeat_interleave(torch.tensor(counts)) + within
    placed = [(at, count, 0) for at, count in zip(accumulate(counts, initial=0), counts, strict=False)]
    rows = Rows.of(torch.zeros_like(last), last, placed, torch.zeros(1, dtype=torch.int64), group=group)
    tiles = [-(-count // rows.rooms.shape[1]) for count in counts]
    firsts = accumulate(tiles, initial=0)
    return RowsPlan([(span, rows.tiles(*own)) for span, *own in zip(spans, firsts, tiles, strict=False)])


def block_attention(query: Tensor, keys: Tensor, values: Tensor, plan: RowsPlan | BlockPlan, layer: int) -> Tensor:
    """As `attention.block_attention`."""
    if isinstance(plan, BlockPlan):
        return plain.block_attention(query, keys, values, plan, layer)
    count, heads, dim = query.shape
    kv_heads = keys.shape[1]
    function = attend_llvm.compiled(Heads(heads // kv_heads, dim, _ONE_PAGE))
    query, out, first = query.contiguous(), query.new_empty(count, heads * dim), 0
    for span, rows in plan.spans:
        part = slice(first, first + span.count)
        span.context.with_rows(layer, keys[part].transpose(0, 1), values[part].transpose(0, 1), span.at)
        storage = span.context.layer_rows(layer).flatten(0, 1)
        attend(function, query, storage, rows, dim**-0.5, out)
        first += span.count
    return out
