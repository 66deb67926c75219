"""Room for contexts, and the context K/V of one sequence. Leaves the making of rows to the model.

Each context position becomes one K/V row a draft layer, appended once and never changed. The present block's own rows
are written right behind the context, where the next ones will land, so attention reads one contiguous tensor and
nothing is ever copied or rolled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.errors import OutOfPages
from services.draft.ngram import NgramContext

__all__ = ["PAGE_SIZE", "ContextKV", "ContextRoom", "KVShape"]

PAGE_SIZE = 16  # positions; only the unit in which room is reported

_FIRST_ROOM = 256  # positions; doubled whenever it is full
_UNIT = 8  # positions that a kernel may read at a time, whether they are there or not


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shapes of the K/V rows of one position, and the rows of one block."""

    layers: int
    kv_heads: int
    head_dim: int
    block_rows: int


class ContextKV:
    """K/V of one sequence's context in every draft layer: (layers, 2, kv_heads, room, head_dim).

    `length` counts context rows 0 … length - 1. `limit` is the most it may ever hold, the block's rows included. `ids`:
    the ids behind these positions, for a drafter that takes hints.
    """

    def __init__(self, shape: KVShape, limit: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.length = 0
        self.ids: NgramContext | None = None
        self._shape = shape
        self._limit = limit
        self._rows = self._allocate(min(limit, _FIRST_ROOM), dtype, device)

    def append(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int, count: int) -> None:
        """Take rows first … first + count - 1 of each layer's (K, V), both (n, kv_heads, head_dim)."""
        end = self.length + count
        self.require(end)
        for own, (keys, values) in zip(self._rows, layers, strict=True):
            own[0, :, self.length : end] = keys[first : first + count].transpose(0, 1)
            own[1, :, self.length : end] = values[first : first + count].transpose(0, 1)
        self.length = end

    def keep(self, count: int) -> None:
        """The first `count` rows that every layer was given behind the context belong to it from now on."""
        self.length += count

    def require(self, positions: int) -> None:
        """Make room for this many positions and a block behind them. `OutOfPages` past the limit."""
        needed = positions + self._shape.block_rows
        if needed > self._limit:
            raise OutOfPages(
                f"{positions} context positions are over the {self._limit - self._shape.block_rows} reserved"
            )
        room = self._rows.shape[3]
        if needed > room:
            grown = self._allocate(min(self._limit, max(needed, 2 * room)), self._rows.dtype, self._rows.device)
            grown[:, :, :, : self.length] = self._rows[:, :, :, : self.length]
            self._rows = grown

    def with_rows(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, at: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's context, the first `at` rows behind it, and these rows, which are written there.

        Args:
            layer: draft layer, from 0.
            keys: (kv_heads, rows, head_dim), normed and rotated.
            values: (kv_heads, rows, head_dim).
            at: how far behind the context the rows go.

        Returns:
            K and V, (1, kv_heads, length + at + rows, head_dim), views that the next call may overwrite.
        """
        start = self.length + at
        end = start + keys.shape[1]
        own_keys, own_values = self._rows[layer, :, None, :, :end].unbind()
        own_keys[0, :, start:] = keys
        own_values[0, :, start:] = values
        return own_keys, own_values

    def layer_rows(self, layer: int = 0) -> torch.Tensor:
        """K and V of one draft layer as they lie now: (2, kv_heads, room, head_dim); layers follow each other."""
        return self._rows[layer]

    def _allocate(self, room: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape, room = self._shape, max(room, _UNIT)
        return torch.empty(shape.layers, 2, shape.kv_heads, room, shape.head_dim, dtype=dtype, device=device)


class ContextRoom:
    """Promises room up to a cap on positions: in full at the start, to be filled as it is used."""

    def __init__(self, positions: int, block_rows: int) -> None:
        """`positions` of all contexts together; `block_rows` go to each context beside its own."""
        self._positions = positions
        self._block_rows = block_rows
        self._reserved = 0

    def reserve(self, max_len: int) -> int:
        """Room for a context of up to max_len positions, and its limit. `OutOfPages` if that is not free."""
        limit = max_len + self._block_rows
        free = self._positions - self._reserved
        if limit > free:
            raise OutOfPages(f"max_len {max_len} needs room for {limit} context positions, {free} are free")
        self._reserved += limit
        return limit

    def release(self, max_len: int) -> None:
        """Give back what `reserve(max_len)` took."""
        self._reserved -= max_len + self._block_rows

    @property
    def free_pages(self) -> int:
        """Unreserved room in pages of PAGE_SIZE positions."""
        return (self._positions - self._reserved) // PAGE_SIZE

    @property
    def total_pages(self) -> int:
        """All room in pages of PAGE_SIZE positions."""
        return self._positions // PAGE_SIZE
