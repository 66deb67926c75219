"""Features on their way into the engine: what has come for which sequence, and who waits for it. Runs on the loop.

Knows positions only; the engine computes K/V from what `take` hands over, and finds gaps.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dspark.messages import FeatureBlock, SequenceKey

__all__ = ["FeatureInbox"]


@dataclass(eq=False, slots=True)
class _Wait:
    """One waiter: the lengths it needs, sequences leaving as theirs are reached."""

    missing: dict[SequenceKey, int]
    done: asyncio.Future[None]


class FeatureInbox:
    """Feature blocks not yet in the engine, and per sequence the length that is here without a gap."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        """`arrived` is called whenever there is something to take."""
        self._arrived = arrived
        self._lengths: dict[SequenceKey, int] = {}
        self._anchors: dict[SequenceKey, int] = {}
        self._blocks: dict[SequenceKey, deque[FeatureBlock]] = {}
        self._positions = 0
        self._gaps: set[SequenceKey] = set()  # sequences with a block that leaves one
        self._waits: dict[SequenceKey, set[_Wait]] = defaultdict(set)

    def open(self, key: SequenceKey) -> None:
        """Expect features of this sequence from position 0 on; those of unknown ones are dropped."""
        self._lengths.setdefault(key, 0)

    def close(self, key: SequenceKey) -> None:
        """Forget a sequence; nobody waits for it any longer."""
        self._lengths.pop(key, None)
        self._anchors.pop(key, None)
        self._forget_blocks(key)
        for wait in self._waits.pop(key, set()):
            _reached(wait, key)

    def length(self, key: SequenceKey) -> int | None:
        """Positions 0 … length - 1 are here; None for a sequence that is not open."""
        return self._lengths.get(key)

    def anchor(self, key: SequenceKey) -> int | None:
        """The token behind these positions, at position `length`; None where none has come."""
        return self._anchors.get(key)

    def rewind(self, key: SequenceKey, length: int) -> None:
        """The engine has only this much: what came after it was lost, but for what is here still and goes on there."""
        if key in self._lengths:
            self._lengths[key] = length
            self._anchors.pop(key, None)
            for block in tuple(self._forget_blocks(key)):
                if block.start <= self._lengths[key]:
                    self.feed(block)

    def feed(self, block: FeatureBlock) -> None:
        """Take a block from a verifier; one that leaves a gap is handed on for the engine to refuse."""
        length = self._lengths.get(block.key)
        end = block.start + block.count
        if length is None or end <= length:
            return
        self._blocks.setdefault(block.key, deque()).append(block)
        self._positions += block.count
        if block.start > length:
            self._gaps.add(block.key)
        else:
            self._lengths[block.key] = end
            if block.token_ids:
                self._anchors[block.key] = block.token_ids[-1]
            self._wake(block.key, end)
        self._arrived()

    def take(self, keys: Collection[SequenceKey], oldest: int = 0) -> list[FeatureBlock]:
        """All of these sequences and of those with gaps, and of others, first come first, until so many positions.

        A sequence's blocks are in the order in which they came.
        """
        taken = [block for key in dict.fromkeys((*keys, *self._gaps)) for block in self._forget_blocks(key)]
        left = oldest - sum(block.count for block in taken)
        while left > 0 and self._blocks:
            blocks = next(iter(self._blocks.values()))
            taken.append(block := blocks.popleft())
            left -= block.count
            self._positions -= block.count
            if not blocks:
                del self._blocks[block.key]
        return taken

    def _forget_blocks(self, key: SequenceKey) -> Iterable[FeatureBlock]:
        self._gaps.discard(key)
        blocks = self._blocks.pop(key, ())
        self._positions -= sum(block.count for block in blocks)
        return blocks

    @property
    def keys(self) -> Iterator[SequenceKey]:
        """Sequences of what waits to be taken."""
        return iter(self._blocks)

    @property
    def pressing(self) -> bool:
        """A block among them leaves a gap: the engine has to be asked for what is missing."""
        return bool(self._gaps)

    def __len__(self) -> int:
        """Positions waiting to be taken."""
        return self._positions

    async def wait(self, needs: Mapping[SequenceKey, int], seconds: float) -> None:
        """Return once every sequence has the length it needs or is closed, at the latest after `seconds`."""
        missing = {key: need for key, need in needs.items() if self._lengths.get(key, need) < need}
        if not missing or seconds <= 0:
            return
        wait = _Wait(missing, asyncio.get_running_loop().create_future())
        for key in missing:
            self._waits[key].add(wait)
        try:
            await asyncio.wait([wait.done], timeout=seconds)
        finally:
            self._forget(wait)

    def _wake(self, key: SequenceKey, length: int) -> None:
        for wait in tuple(self._waits.get(key, ())):
            if wait.missing[key] <= length:
                _reached(wait, key)
                self._waits[key].discard(wait)

    def _forget(self, wait: _Wait) -> None:
        for key in wait.missing:
            waits = self._waits.get(key)
            if waits is not None:
                waits.discard(wait)
                if not waits:
                    del self._waits[key]


def _reached(wait: _Wait, key: SequenceKey) -> None:
    wait.missing.pop(key, None)
    if not wait.missing and not wait.done.done():
        wait.done.set_result(None)
