"""The most likely tokens of a row, exactly: higher logit first, equal logits by lower token id.

Library top-k leaves the order of equal values open, and bfloat16 logits are full of them. Here value and id become one
integer key; keys are unique, so that any top-k gives the same answer on every device and in every batch.
"""

from __future__ import annotations

import torch

__all__ = ["BLOCK", "padded_width", "top"]

BLOCK = 64
"""Tokens a block: rows are searched, and summed, by blocks."""

_LOW = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


def padded_width(vocab: int) -> int:
    """The least multiple of `BLOCK` that holds `vocab` tokens."""
    return -(-vocab // BLOCK) * BLOCK


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys: greater for the greater float32 value, then for the lower id; -0.0 equals 0.0."""
    bits = (values + 0.0).view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(_MAGNITUDE).bitwise_xor_(bits)
    return ordered.long().bitwise_left_shift_(32).bitwise_or_(_LOW - ids)


def _split(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values back from keys."""
    ordered = (keys >> 32).int()
    bits = (ordered >> 31).bitwise_and_(_MAGNITUDE).bitwise_xor_(ordered)
    return _LOW - (keys & _LOW), bits.view(torch.float32)


def top(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` greatest of each row in order.

    Only blocks whose maximum is among the `count` best can hold any of them: a block left out has `count` blocks before
    it, each with an element that is greater, or equal with a lower id.

    Args:
        values: float32 (rows, width), width a multiple of `BLOCK`; no NaN.
        count: how many, at most width.

    Returns:
        ids int64 (rows, count) and values float32 (rows, count).
    """
    rows, width = values.shape
    ids = torch.arange(width, device=values.device)
    if count * BLOCK < width:
        blocks = values.view(rows, -1, BLOCK)
        best = torch.topk(_keys(blocks.amax(-1), ids[: width // BLOCK]), count, sorted=False)[0]
        chosen = _LOW - (best & _LOW)
        row = torch.arange(rows, device=values.device).unsqueeze(-1)
        values = blocks[row, chosen].view(rows, -1)
        ids = (chosen.unsqueeze(-1) * BLOCK + ids[:BLOCK]).view(rows, -1)
    return _split(torch.topk(_keys(values, ids), count)[0])
