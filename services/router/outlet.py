"""What flows from the engine loop to one client. The loop never waits here; the client's handler does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from dspark.errors import DSparkError
from dspark.messages import PositionLogprobs
from services.router.counts import Counts
from services.router.finish import PORTION, FinishReason

__all__ = ["Delta", "Finished", "Outlet"]


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens; the text may lag the ids."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()

    def then(self, later: Delta) -> Delta:
        """Both as one."""
        if not self.token_ids and not self.text:
            return later
        return replace(
            self,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
        )


@dataclass(frozen=True, slots=True)
class Finished:
    """How a completed request ended; times in seconds from arrival."""

    reason: FinishReason
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    speculation: bool
    counts: Counts
    drafter: str = ""
    stop_match: str = ""


class Outlet:
    """Holds what the client has not read yet, as one growing delta.

    `full` asks the engine to leave the sequence out of its rounds; `on_room` is called when the client has read again.
    With `whole` the client hears nothing before the end, but for portions of a long answer.
    """

    def __init__(self, limit: int = 4096, *, whole: bool = False) -> None:
        self._limit = limit
        self._portion = min(PORTION, limit) if whole else 0
        self._pending = Delta()
        self._end: Finished | DSparkError | None = None
        self._news = asyncio.Event()
        self._full_since = 0.0
        self.on_room: Callable[[], None] | None = None

    @property
    def full(self) -> bool:
        """Whether more tokens wait than a client should be behind."""
        return len(self._pending.token_ids) >= self._limit

    def push(self, delta: Delta) -> None:
        """Adds to what the client will read next."""
        if self._end is None:
            was_full = self.full
            self._pending = self._pending.then(delta)
            if len(self._pending.token_ids) >= self._portion:
                self._news.set()
            if self.full and not was_full:
                self._full_since = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether the last word is said."""
        return self._end is not None

    @property
    def full_seconds(self) -> float:
        """For how long it has been full; 0 while it is not."""
        return time.monotonic() - self._full_since if self.full else 0.0

    def end(self, how: Finished | DSparkError) -> None:
        """The last word; what is pending still goes out first. Later calls change nothing."""
        if self._end is None:
            self._end = how
            self._news.set()

    async def next(self) -> Delta | Finished:
        """The next event, `Finished` being the last. Raises the error the request ended with."""
        await self._news.wait()
        if self._pending.token_ids or self._pending.text:
            return self._take()
        if isinstance(self._end, DSparkError):
            raise self._end
        assert self._end is not None
        return self._end

    def _take(self) -> Delta:
        was_full, delta = self.full, self._pending
        self._pending = Delta()
        if self._end is None:
            self._news.clear()
        if was_full and self.on_room is not None:
            self.on_room()
        return delta
