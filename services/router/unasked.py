"""Blocks that one draft worker has sent unasked, until a round takes them. Knows no rounds and no gRPC.

A draft worker told to stay with a sequence drafts again as soon as the verify worker's features reach it. So a block is
often here, or on its way, before the round that wants it has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from dspark.messages import Proposal, ProposeResult, SequenceKey

__all__ = ["Came", "Unasked"]


@dataclass(frozen=True, slots=True)
class Came:
    """A block and the batch in which it was drafted."""

    proposal: Proposal
    result: ProposeResult

    def cut(self, tokens: int) -> Came:
        """No more than so many of its tokens."""
        return self if len(self.proposal.tokens) <= tokens else replace(self, proposal=self.proposal.cut(tokens))


class Unasked:
    """The latest block of each sequence. `member` tells who has this draft worker: nobody waits for others' blocks."""

    def __init__(self, member: Callable[[SequenceKey], bool]) -> None:
        self._member = member
        self._latest: dict[SequenceKey, Came] = {}
        self._news = asyncio.Event()

    def add(self, result: ProposeResult) -> None:
        """They have come; whoever waits is told."""
        for proposal in result.proposals:
            if self._member(proposal.key):
                self._latest[proposal.key] = Came(proposal, result)
        self._news.set()

    def find(self, key: SequenceKey, committed_len: int) -> Came | None:
        """The sequence's block, if it is for where the sequence is now. It stays until the next one comes."""
        came = self._latest.get(key)
        return came if came is not None and came.proposal.committed_len == committed_len else None

    def forget(self, keys: Iterable[SequenceKey]) -> None:
        """Nobody wants them, or waits for them, any more."""
        for key in keys:
            self._latest.pop(key, None)
        self._news.set()

    async def wait(self, lengths: Mapping[SequenceKey, int], seconds: float) -> None:
        """Returns once each member's block for its committed length is here, at the latest after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not all(self._has(key, length) for key, length in lengths.items()):
                    self._news.clear()
                    await self._news.wait()

    def _has(self, key: SequenceKey, committed_len: int) -> bool:
        return not self._member(key) or self.find(key, committed_len) is not None
