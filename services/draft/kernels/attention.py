"""Torch reference of a block's attention: over its sequence's injected context and over itself (DSpark §2.2).

On a CPU every sequence attends at its own length, one after another: padding a batch costs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from services.draft.context import ContextKV

__all__ = ["BlockPlan", "Span", "block_attention", "plan_block"]


@dataclass(frozen=True, slots=True)
class Span:
    """`count` rows of a batch that belong to one context: they lie `at` rows behind it."""

    context: ContextKV
    count: int
    at: int = 0


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What all layers share in one forward: the spans that cover its rows, and who sees whom inside a span."""

    spans: Sequence[Span]
    causal: bool


def plan_block(spans: Sequence[Span], *, causal: bool, group: int) -> BlockPlan:
    """A row sees its context, all rows behind it, and of its own span's rows all, or with `causal` those up to itself.

    `group` query heads share a key/value head. Contexts may not grow between the plan and its use.
    """
    del group
    return BlockPlan(spans, causal)


def block_attention(query: Tensor, keys: Tensor, values: Tensor, plan: BlockPlan, layer: int) -> Tensor:
    """Write K/V rows behind their contexts, and attend: softmax(q kᵀ / √D) v, (n, heads · D), contiguous.

    `query` (n, heads, D), `keys` and `values` (n, kv heads, D), keys normed and rotated, all of the contexts' dtype.
    """
    kv_heads = keys.shape[1]
    query = query.reshape(len(query), kv_heads, -1, query.shape[2])
    counts = [span.count for span in plan.spans]
    parts = zip(*(torch.split(rows, counts) for rows in (query, keys, values)), strict=True)
    mixed = [_attend(layer, span, *part, causal=plan.causal) for span, part in zip(plan.spans, parts, strict=True)]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _attend(index: int, span: Span, query: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Tensor:
    """One span's rows over its context and themselves: (rows, heads · D), from a query (rows, kv heads, group, D).

    Keys and values are (rows, kv heads, D). Query heads that share a key/value head become rows of one product.
    """
    rows, kv_heads, group, dim = query.shape
    all_keys, all_values = span.context.with_rows(index, keys.transpose(0, 1), values.transpose(0, 1), span.at)
    folded = query.permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, dim)
    mask = None
    if causal and rows > 1:
        last = torch.arange(all_keys.shape[2] - rows, all_keys.shape[2], device=query.device)
        mask = (torch.arange(all_keys.shape[2], device=query.device) <= last[:, None]).repeat(group, 1)
    mixed = functional.scaled_dot_product_attention(folded, all_keys, all_values, attn_mask=mask)
    return mixed.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, kv_heads * group * dim)
