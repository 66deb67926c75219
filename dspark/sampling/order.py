"""Rows of logits, and their most likely tokens exactly: higher logit first, equal logits by lower token id.

Library top-k leaves the order of equal values open, and bfloat16 logits are full of them. Here value and id become one
integer key; keys are unique, so that any top-k gives the same answer on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dspark.kernels.logits import BLOCK, TORCH_LOGITS, LogitKernels
from dspark.sampling.scratch import scratch

__all__ = ["BLOCK", "LogitRows", "best_first", "ordered_bits", "padded_width", "top"]

_LOW = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Some rows of logits in float32 on a thread-wide buffer, and the maxima of their blocks."""

    values: torch.Tensor
    """float32 (rows, width); width is a multiple of `BLOCK`, -inf past the vocabulary."""
    maxima: torch.Tensor
    """float32 (rows, width / BLOCK)."""
    passes: LogitKernels = TORCH_LOGITS
    """What goes over them."""

    @staticmethod
    def of(logits: torch.Tensor, rows: Sequence[int], passes: LogitKernels = TORCH_LOGITS) -> LogitRows:
        """A copy of some rows of bfloat16 or float32 logits (any, vocabulary)."""
        values = scratch.take("logits", len(rows), padded_width(logits.shape[1]), logits.device)
        return LogitRows(values, passes.gather(logits, rows, values), passes)

    @property
    def sound(self) -> torch.Tensor:
        """Bool (rows,): no NaN or +inf, and something above -inf."""
        return self.maxima.amax(-1).isfinite()

    def mend(self, sound: torch.Tensor) -> None:
        """Make the unsound rows uniform, so that they disturb nothing."""
        self.values[~sound] = 0.0
        self.maxima[~sound] = 0.0

    def at(self, row: int) -> LogitRows:
        """One row of these."""
        return replace(self, values=self.values[row : row + 1], maxima=self.maxima[row : row + 1])


def padded_width(vocab: int) -> int:
    """The least multiple of `BLOCK` that holds `vocab` tokens."""
    return -(-vocab // BLOCK) * BLOCK


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """int32 in the order of float32 values; -0.0 equals 0.0."""
    bits = (values + 0.0).view(torch.int32)
    return (bits >> 31).bitwise_and_(_MAGNITUDE).bitwise_xor_(bits)


def _keys(values: torch.Tensor, low_words: torch.Tensor) -> torch.Tensor:
    """int64 keys: greater for the greater value, then for the greater low word, which is `_LOW` - id."""
    return ordered_bits(values).long().bitwise_left_shift_(32).bitwise_or_(low_words)


def best_first(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Indices that sort values (n,), float32, descending; equal ones by ascending ids int64 (n,)."""
    return _keys(values, _LOW - ids).argsort(descending=True)


def top(logits: LogitRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` greatest logits of each row in order, `count` at most the width; rows are sound.

    Only blocks whose maximum is among the `count` best can hold any of them: a block left out has `count` blocks before
    it, each with an element that is greater, or equal with a lower id.

    Returns:
        ids int64 (rows, count) and values float32 (rows, count).
    """
    values, (rows, width) = logits.values, logits.values.shape
    if count * BLOCK < width:
        low_words = torch.arange(_LOW, _LOW - width // BLOCK, -1, device=values.device)
        chosen = _LOW - (torch.topk(_keys(logits.maxima, low_words), count, sorted=False)[0] & _LOW)
        row = torch.arange(rows, device=values.device).unsqueeze(-1)
        values = values.view(rows, -1, BLOCK)[row, chosen].view(rows, -1)
        inside = torch.arange(_LOW, _LOW - BLOCK, -1, device=values.device)
        low_words = (inside - (chosen * BLOCK).unsqueeze(-1)).view(rows, -1)
    else:
        low_words = torch.arange(_LOW, _LOW - width, -1, device=values.device)
    keys = torch.topk(_keys(values, low_words), count)[0]
    ordered = (keys >> 32).int()
    bits = (ordered >> 31).bitwise_and_(_MAGNITUDE).bitwise_xor_(ordered)
    return _LOW - (keys & _LOW), bits.view(torch.float32)
