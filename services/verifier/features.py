"""Where features live: one bfloat16 buffer per tap beside the K/V pages. Knows pages and slots, not sequences.

A position's slot is its full-attention page and its place in it, so that a page found in the prefix cache brings its
features along. Each slot says whether it holds them: a page handed out anew holds none, and a tap registered late, or
a sequence that wanted no features, leaves holes (`backfill.py` fills those that somebody asks for).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.errors import Overloaded
from dspark.messages import TapInfo
from services.verifier.taps import Tap

__all__ = ["FeatureStore"]


class FeatureStore:
    """The registered taps and what they computed, by page and slot. For one thread."""

    def __init__(self, *, pages: int, page_size: int, device: torch.device | str = "cpu", max_taps: int = 4) -> None:
        """Page ids are below `pages`; each tap's buffer is pages * page_size * d * 2 bytes."""
        self._pages = pages
        self._page_size = page_size
        self._device = device
        self._max_taps = max_taps
        self._buffers: dict[str, _Buffer] = {}

    @property
    def tap_ids(self) -> tuple[str, ...]:
        """Registered taps, oldest first."""
        return tuple(self._buffers)

    @property
    def layers(self) -> frozenset[int]:
        """Layers whose output a forward has to capture."""
        return frozenset(layer for buffer in self._buffers.values() for layer in buffer.tap.info.layer_ids)

    def info(self, tap_id: str) -> TapInfo:
        """The description of a registered tap; KeyError where it is unknown."""
        return self._buffers[tap_id].tap.info

    def add(self, tap: Tap, *, in_use: frozenset[str] = frozenset()) -> None:
        """Keep a tap; with no room for another, forget the oldest that is not `in_use`, or raise `Overloaded`."""
        if tap.info.tap_id in self._buffers:
            return
        if len(self._buffers) >= self._max_taps:
            idle = [tap_id for tap_id in self._buffers if tap_id not in in_use]
            if not idle:
                raise Overloaded(f"{self._max_taps} taps are registered and in use, the limit", retry_after=10.0)
            del self._buffers[idle[0]]
        self._buffers[tap.info.tap_id] = _Buffer(tap, self._pages * self._page_size, self._device)

    def forget(self, page: int) -> None:
        """The page was handed out anew: what its slots hold is another text's."""
        first = page * self._page_size
        for buffer in self._buffers.values():
            buffer.known[first : first + self._page_size] = False

    def write(self, captured: Mapping[int, Tensor], placed: Sequence[tuple[int, Sequence[int], int]]) -> None:
        """Compute and keep features of states (n, hidden), for every tap.

        `placed`: whose the rows are, one sequence behind the other: how many, its pages, position of the first.
        """
        if not placed or not self._buffers:
            return
        places = [self._places(pages, start, start + count) for count, pages, start in placed]
        for buffer in self._buffers.values():
            features, first = buffer.tap.project(captured), 0
            for own, (count, *_) in zip(places, placed, strict=True):
                buffer.put(own, features[first : first + count])
                first += count

    def known_until(self, tap_id: str, pages: Sequence[int], start: int, end: int) -> int:
        """The first position from `start` on, up to `end`, that lacks features of the tap."""
        known = self._buffers[tap_id].known[self._places(pages, start, end)]
        return end if known.all() else start + int(known.argmin())

    def read(self, tap_id: str, pages: Sequence[int], start: int, end: int) -> bytes:
        """Features of positions start … end - 1 as little-endian bfloat16 bytes, row-major (end - start, d)."""
        rows = self._buffers[tap_id].data[self._places(pages, start, end)]
        return rows.cpu().view(torch.uint8).numpy().tobytes()

    def _places(self, pages: Sequence[int], start: int, end: int) -> slice | NDArray[np.int64]:
        """Slots of positions; a slice where they are in one page, as they mostly are while decoding."""
        size = self._page_size
        page, first = divmod(start, size)
        if first + end - start > size:
            return np.array([pages[position // size] * size + position % size for position in range(start, end)])
        slot = pages[page] * size + first
        return slice(slot, slot + end - start)


class _Buffer:
    """One tap and its slots; the memory is touched, so really taken, only where features are written."""

    def __init__(self, tap: Tap, slots: int, device: torch.device | str) -> None:
        self.tap = tap
        self.data = torch.zeros((slots, tap.info.feature_size), dtype=torch.bfloat16, device=device)
        self.known = np.zeros(slots, np.bool_)

    def put(self, places: slice | NDArray[np.int64], features: Tensor) -> None:
        """These slots' features are known from now on."""
        self.data[places] = features
        self.known[places] = True
