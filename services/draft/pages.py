"""Contexts in pages of common memory, which compiled kernels are told of once: `services.draft.kernels.attention_llvm`.

Pages come with the first positions that need them and go back when a context is gone. Memory is doubled, and moved,
when none is free: how much all contexts may take is `context.ContextRoom`'s affair.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable

import torch

from services.draft.context import PAGE_SIZE, ContextKV, KVShape

__all__ = ["ContextPages", "PagedKV"]

_FIRST_PAGES = 256


class ContextPages:
    """Memory of all contexts of a drafter. Implements `context.Contexts`; for one thread, in float32 on a CPU."""

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self._identity: Hashable = object()
        self._rows = self._allocate(_FIRST_PAGES)
        self._free = list(range(_FIRST_PAGES - 1, -1, -1))

    @property
    def identity(self) -> Hashable:
        """As in `Contexts`."""
        return self._identity

    def open(self, limit: int) -> ContextKV:
        """As in `Contexts`."""
        return PagedKV(self, limit)

    def layer(self, index: int) -> torch.Tensor:
        """K, then V, of a draft layer: (2 · kv_heads, pages · PAGE_SIZE, head_dim)."""
        return self._rows[index]

    def take(self) -> int:
        """A page."""
        if not self._free:
            self._grow()
        return self._free.pop()

    def give_back(self, pages: Iterable[int]) -> None:
        """Nobody needs these any more; what was freed last is given out first, its memory is there already."""
        self._free.extend(pages)

    def _grow(self) -> None:
        before = self._rows.shape[2] // PAGE_SIZE
        rows = self._allocate(2 * before)
        rows[:, :, : before * PAGE_SIZE] = self._rows
        self._rows, self._identity = rows, object()
        self._free = list(range(2 * before - 1, before - 1, -1))

    def _allocate(self, pages: int) -> torch.Tensor:
        shape = self.shape
        return torch.empty(shape.layers, 2 * shape.kv_heads, pages * PAGE_SIZE, shape.head_dim)


class PagedKV(ContextKV):
    """One context; `pages` in the order of its positions."""

    def __init__(self, memory: ContextPages, limit: int) -> None:
        super().__init__(memory.shape, limit)
        self.pages: list[int] = []
        self._memory = memory
        self._make_room(min(limit, memory.shape.block_rows))
        weakref.finalize(self, memory.give_back, self.pages).atexit = False

    def slots(self, start: int, count: int) -> torch.Tensor:
        """Places of positions in a layer's memory, (count,) int64."""
        places = range(start, start + count)
        slots = [self.pages[n // PAGE_SIZE] * PAGE_SIZE + n % PAGE_SIZE for n in places]
        return torch.tensor(slots, dtype=torch.int64)

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, at: int = 0) -> None:
        """As in `ContextKV`."""
        both = torch.cat((keys, values), 1).transpose(0, 1)
        self._memory.layer(layer)[:, self.slots(self.length + at, len(keys))] = both

    def layer_rows(self, layer: int = 0) -> torch.Tensor:
        """As in `ContextKV`; a copy."""
        rows = self._memory.layer(layer)[:, self.slots(0, len(self.pages) * PAGE_SIZE)]
        return rows.view(2, self._shape.kv_heads, *rows.shape[1:])

    def _make_room(self, positions: int) -> None:
        while len(self.pages) * PAGE_SIZE < positions:
            self.pages.append(self._memory.take())
