"""Room for contexts, and the context K/V of one sequence. Leaves the making of rows to the model.

Each context position becomes one K/V row a draft layer, appended once and never changed. The present block's own rows
are written right behind the context, where the next ones will land, so that nothing is rolled back.
Contexts have memory of their own here; `pages` has them in common memory, for kernels that find them there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dspark.errors import OutOfPages
from services.draft.ngram import NgramContext

__all__ = ["PAGE_SIZE", "ContextKV", "ContextMemory", "ContextRoom", "ContiguousKV", "KVShape", "OwnMemory"]

PAGE_SIZE = 16  # positions; the unit in which room is reported, and given to contexts in pages

_FIRST_ROOM = 256  # positions; doubled whenever it is full


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shapes of the K/V rows of one position, and the rows of one block."""

    layers: int
    kv_heads: int
    head_dim: int
    block_rows: int


class ContextKV(ABC):
    """K/V of one sequence's context in every draft layer.

    `length` counts context rows 0 … length - 1. `limit` is the most it may ever hold, the block's rows included. `ids`:
    the ids behind these positions, for a drafter that takes hints.
    """

    def __init__(self, shape: KVShape, limit: int) -> None:
        self.length = 0
        self.ids: NgramContext | None = None
        self._shape = shape
        self._limit = limit

    def append(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int, count: int) -> None:
        """Take rows first … first + count - 1 of each layer's (K, V), both (n, kv_heads, head_dim)."""
        self.require(self.length + count)
        part = slice(first, first + count)
        for layer, (keys, values) in enumerate(layers):
            self.put(layer, keys[part], values[part])
        self.length += count

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
        self._make_room(needed)

    @abstractmethod
    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, at: int = 0) -> None:
        """Write rows behind a draft layer's context and `at` more, where there is room.

        `keys`, normed and rotated, and `values` are (rows, kv_heads, head_dim).
        """

    @abstractmethod
    def layer_rows(self, layer: int = 0) -> torch.Tensor:
        """K and V of one draft layer, (2, kv_heads, room, head_dim)."""

    @abstractmethod
    def _make_room(self, positions: int) -> None:
        """Room for so many positions, if there is not."""


class ContextMemory(Protocol):
    """Where one drafter's contexts lie."""

    @property
    def identity(self) -> Hashable:
        """Equal as long as contexts lie in the same memory: part of what programs over it are remembered by."""
        ...

    def open(self, limit: int) -> ContextKV:
        """An empty context of at most `limit` rows, a block's included."""
        ...


class OwnMemory:
    """Contexts with memory of their own each, as it is needed."""

    identity: Hashable = None

    def __init__(self, shape: KVShape, positions: int, dtype: torch.dtype, device: torch.device) -> None:
        """`positions`, of all contexts together, need no room of their own here."""
        del positions
        self._shape, self._dtype, self._device = shape, dtype, device

    def open(self, limit: int) -> ContextKV:
        """As in `ContextMemory`."""
        return ContiguousKV(self._shape, limit, dtype=self._dtype, device=self._device)


class ContiguousKV(ContextKV):
    """Rows of one tensor, (layers, 2, kv_heads, room, head_dim), which is doubled whenever it is full."""

    def __init__(self, shape: KVShape, limit: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, limit)
        self._rows = self._allocate(min(limit, _FIRST_ROOM), dtype, device)

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, at: int = 0) -> None:
        """As in `ContextKV`."""
        start = self.length + at
        part = slice(start, start + len(keys))
        self._rows[layer, 0, :, part] = keys.transpose(0, 1)
        self._rows[layer, 1, :, part] = values.transpose(0, 1)

    def with_rows(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, at: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's context, the first `at` rows behind it, and these rows, which are `put` there.

        Returns K and V, (1, kv_heads, length + at + rows, head_dim), views that the next call may overwrite.
        """
        self.put(layer, keys, values, at)
        own_keys, own_values = self._rows[layer, :, None, :, : self.length + at + len(keys)].unbind()
        return own_keys, own_values

    def layer_rows(self, layer: int = 0) -> torch.Tensor:
        """As in `ContextKV`, where they lie; layers follow each other."""
        return self._rows[layer]

    def _make_room(self, positions: int) -> None:
        room = self._rows.shape[3]
        if positions > room:
            grown = self._allocate(min(self._limit, max(positions, 2 * room)), self._rows.dtype, self._rows.device)
            grown[:, :, :, : self.length] = self._rows[:, :, :, : self.length]
            self._rows = grown

    def _allocate(self, room: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = self._shape
        return torch.empty(shape.layers, 2, shape.kv_heads, room, shape.head_dim, dtype=dtype, device=device)


class ContextRoom:
    """Promises room up to a cap on positions, in whole pages: in full at the start, to be filled as it is used."""

    def __init__(self, positions: int, block_rows: int) -> None:
        """`positions` of all contexts together; `block_rows` go to each context beside its own."""
        self.total_pages = -(-positions // PAGE_SIZE)
        self.free_pages = self.total_pages
        """Unreserved, of PAGE_SIZE positions each."""
        self._block_rows = block_rows

    def reserve(self, max_len: int) -> int:
        """Room for a context of up to max_len positions, and its limit. `OutOfPages` if that is not free."""
        pages = self._pages(max_len)
        if pages > self.free_pages:
            needed, free = PAGE_SIZE * pages, PAGE_SIZE * self.free_pages
            raise OutOfPages(f"max_len {max_len} needs room for {needed} context positions, {free} are free")
        self.free_pages -= pages
        return max_len + self._block_rows

    def release(self, max_len: int) -> None:
        """Give back what `reserve(max_len)` took."""
        self.free_pages += self._pages(max_len)

    def _pages(self, max_len: int) -> int:
        return -(-(max_len + self._block_rows) // PAGE_SIZE)
