"""Torch reference of a block's attention: over its sequence's injected context and over itself (DSpark §2.2).

On a CPU every sequence attends at its own length, one after another: padding a batch costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dspark.kernels import reference
from services.draft.context import ContextKV, ContextMemory, ContiguousKV

__all__ = ["BlockPlan", "Span", "attend", "block_attention", "inject", "injected", "plan_block", "turned_attention"]


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


def attend(
    qkv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    memory: ContextMemory,
    plan: BlockPlan,
    layer: int,
) -> Tensor:
    """Norm and rotate queries and keys, then `block_attention`.

    `qkv` (n, heads + 2 · kv heads, D), queries first; `weight` (heads + kv heads, D) of the norms; `cos` and `sin` of
    each row's position (n, 1, D / 2); `memory` is where the spans' contexts lie.
    """
    del memory
    return turned_attention(reference.norm_rotary, block_attention, qkv, weight, eps, cos, sin, plan, layer)


def turned_attention(
    norm_rotary: Callable[..., Tensor],
    attention: Callable[..., Tensor],
    qkv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    plan: Any,
    layer: int,
) -> Tensor:
    """`attend` by two functions, the norm with its rotation and the attention proper."""
    turned = len(weight)
    heads = 2 * turned - qkv.shape[1]
    qk = norm_rotary(qkv[:, :turned], weight, eps, cos, sin)
    return attention(qk[:, :heads], qk[:, heads:], qkv[:, turned:], plan, layer)


def inject(
    projected: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    rotary: Sequence[tuple[Tensor, Tensor]],
    memory: ContextMemory,
    pieces: Sequence[tuple[ContextKV, int]],
) -> None:
    """Norm and rotate keys, and append K/V to contexts.

    `projected` (n, layers, 2 · kv heads, D), keys first; `weights` (kv heads, D), `cos` and `sin` (n, 1, D / 2) for
    each layer; `pieces`: whose the rows are, in order, and how many.
    """
    del memory
    injected(reference.norm_rotary, projected, weights, eps, rotary, pieces)


def injected(
    norm_rotary: Callable[..., Tensor],
    projected: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    rotary: Sequence[tuple[Tensor, Tensor]],
    pieces: Sequence[tuple[ContextKV, int]],
) -> None:
    """`inject` by a function for the norm with its rotation."""
    for context, count in pieces:  # all of them or none
        context.require(context.length + count)
    heads = len(weights[0])
    layers = [
        (norm_rotary(projected[:, layer, :heads], weight, eps, *table), projected[:, layer, heads:])
        for layer, (weight, table) in enumerate(zip(weights, rotary, strict=True))
    ]
    first = 0
    for context, count in pieces:
        context.append(layers, first, count)
        first += count


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
    assert isinstance(span.context, ContiguousKV)
    all_keys, all_values = span.context.with_rows(index, keys, values, span.at)
    folded = query.permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, dim)
    mask = None
    if causal and rows > 1:
        last = torch.arange(all_keys.shape[2] - rows, all_keys.shape[2], device=query.device)
        mask = (torch.arange(all_keys.shape[2], device=query.device) <= last[:, None]).repeat(group, 1)
    mixed = functional.scaled_dot_product_attention(folded, all_keys, all_values, attn_mask=mask)
    return mixed.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, kv_heads * group * dim)
