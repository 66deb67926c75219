"""Contexts in pages of common memory, which compiled kernels are told of once: `services.draft.kernels.attention_llvm`.

Pages come with the first positions that need them and go back when a context is gone. Room for all that contexts may
take together is there from the start; memory is taken as it is written.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable

import torch

from dspark.errors import OutOfPages
from services.draft.context import PAGE_SIZE, ContextKV, KVShape

__all__ = ["ContextPages", "PagedKV"]


class ContextPages:
    """Memory of all contexts of a drafter, in float32 on a CPU. Implements `context.ContextMemory`.

    What contexts hold is one thread's; they may be opened in any, and pages come back where the last reference goes.
    """

    def __init__(self, shape: KVShape, positions: int) -> None:
        """`positions`: of all contexts together, each counted in whole pages."""
        self.shape = shape
        self.identity: Hashable = object()
        count = -(-positions // PAGE_SIZE)
        with torch.inference_mode(False):  # usable inside and outside inference mode
            self._rows = torch.empty(shape.layers, 2 * shape.kv_heads, count * PAGE_SIZE, shape.head_dim)
        self._free = list(range(count - 1, -1, -1))

    def open(self, limit: int) -> ContextKV:
        """As in `ContextMemory`."""
        return PagedKV(self, limit)

    def layer(self, index: int) -> torch.Tensor:
        """K, then V, of a draft layer: (2 · kv_heads, pages · PAGE_SIZE, head_dim)."""
        return self._rows[index]

    def take(self) -> int:
        """A page. `OutOfPages` where more positions are needed than there were to be."""
        try:
            return self._free.pop()  # in one go: any thread may
        except IndexError:
            raise OutOfPages(f"all {self._rows.shape[2]} context positions are taken") from None

    def give_back(self, pages: Iterable[int]) -> None:
        """Nobody needs these any more; what was freed last is given out first, its memory is there already."""
        self._free.extend(pages)


class PagedKV(ContextKV):
    """One context; `pages` in the order of its positions."""

    def __init__(self, memory: ContextPages, limit: int) -> None:
        super().__init__(memory.shape, limit)
        self.pages: list[int] = []
        self._memory = memory
        weakref.finalize(self, memory.give_back, self.pages).atexit = False  # before any page: there may be too few
        self._make_room(min(limit, memory.shape.block_rows))

    def slots(self, positions: range) -> list[int]:
        """Their places in a layer's memory."""
        return [self.pages[n // PAGE_SIZE] * PAGE_SIZE + n % PAGE_SIZE for n in positions]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, at: int = 0) -> None:
        """As in `ContextKV`."""
        both, start = torch.cat((keys, values), 1).transpose(0, 1), self.length + at
        self._memory.layer(layer)[:, self.slots(range(start, start + len(keys)))] = both

    def layer_rows(self, layer: int = 0) -> torch.Tensor:
        """As in `ContextKV`; a copy."""
        rows = self._memory.layer(layer)[:, self.slots(range(len(self.pages) * PAGE_SIZE))]
        return rows.view(2, self._shape.kv_heads, *rows.shape[1:])

    def _make_room(self, positions: int) -> None:
        while len(self.pages) * PAGE_SIZE < positions:
            self.pages.append(self._memory.take())
