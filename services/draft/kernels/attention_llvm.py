"""A block's attention by code compiled for the processor: each sequence's rows over its pages, where they are written.

Contexts in float32 take it, in pages as the target's are; for others the plan and the attention are torch's: see
`attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.kernels.attention_llvm import RowPlan, Rows, paged_attention
from dspark.kernels.rowwise_llvm import norm_rotary, norm_rotary_write
from services.draft.context import PAGE_SIZE, ContextKV, ContextMemory, KVShape, OwnMemory
from services.draft.kernels import attention as plain
from services.draft.kernels.attention import BlockPlan, Span
from services.draft.pages import ContextPages, PagedKV

__all__ = ["attend", "inject", "memory", "plan_block"]


def memory(shape: KVShape, positions: int, dtype: torch.dtype, device: torch.device) -> ContextMemory:
    """What these kernels read."""
    if dtype == torch.float32:
        return ContextPages(shape, positions)
    return OwnMemory(shape, positions, dtype, device)


def plan_block(spans: Sequence[Span], *, causal: bool, group: int) -> RowPlan | BlockPlan:
    """As `attention.plan_block`."""
    own = [span.context for span in spans if isinstance(span.context, PagedKV)]
    if len(own) < len(spans):
        return plain.plan_block(spans, causal=causal, group=group)
    counts = [span.count for span in spans]
    starts = [span.context.length + span.at for span in spans]
    places = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    last = np.array([place if causal else one[-1] for one in places for place in one])
    pages = np.array([page for context in own for page in context.pages])
    before = accumulate((len(context.pages) for context in own), initial=0)
    tiled = list(zip(accumulate(counts, initial=0), counts, before, strict=False))
    slots = [slot for context, one in zip(own, places, strict=True) for slot in context.slots(one)]
    return RowPlan(torch.tensor(slots), Rows.of(np.zeros_like(last), last, tiled, pages, group=group), PAGE_SIZE)


class _Written(NamedTuple):
    """Of a plan, where rows go."""

    slots: Tensor
    copied: None = None


def inject(
    projected: Tensor, weights: Sequence[Tensor], eps: float, rotary: Sequence[tuple[Tensor, Tensor]],
    memory: ContextMemory, pieces: Sequence[tuple[ContextKV, int]],
) -> None:  # fmt: skip
    """As `attention.inject`."""
    if not isinstance(memory, ContextPages):
        plain.injected(norm_rotary, projected, weights, eps, rotary, pieces)
        return
    slots = []
    for context, count in pieces:
        assert isinstance(context, PagedKV)
        context.require(context.length + count)
        slots += context.slots(range(context.length, context.length + count))
    places = _Written(torch.tensor(slots))
    for layer, (weight, table) in enumerate(zip(weights, rotary, strict=True)):
        norm_rotary_write(projected[:, layer], weight, eps, *table, memory.layer(layer), places)
    for context, count in pieces:
        context.keep(count)


def attend(
    qkv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, memory: ContextMemory, plan: RowPlan | BlockPlan,
    layer: int,
) -> Tensor:  # fmt: skip
    """As `attention.attend`."""
    if isinstance(plan, BlockPlan):
        return plain.turned_attention(norm_rotary, plain.block_attention, qkv, weight, eps, cos, sin, plan, layer)
    assert isinstance(memory, ContextPages)
    storage = memory.layer(layer)
    query = norm_rotary_write(qkv, weight, eps, cos, sin, storage, plan)
    return paged_attention(query, storage, plan, query.shape[2] ** -0.5)
