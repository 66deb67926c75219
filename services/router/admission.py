"""Who may wait: a bounded queue, checked before anything is awaited, and a rate for each API key."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from asyncio_throttle.throttler import Throttler

from dspark.errors import Overloaded

__all__ = ["Admission", "Ticket"]

MAX_IDLE_KEYS = 1024
MIN_RETRY, MAX_RETRY = 0.1, 60.0
SMOOTHING = 0.1  # weight of the newest gap between two departures


class Ticket:
    """A place in the queue, for `with`; given back once the request runs, or ends."""

    def __init__(self, lane: _Lane | None, leave: Callable[[], None]) -> None:
        self._lane = lane
        self._leave: Callable[[], None] | None = leave

    async def pace(self) -> None:
        """Waits for the key's turn."""
        if self._lane is not None:
            await self._lane.wait()

    def leave(self) -> None:
        """Idempotent."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


class _Lane:
    """One API key's share."""

    def __init__(self, rate: int) -> None:
        self._throttler = Throttler(rate_limit=rate, period=1.0)
        self.waiting = 0
        self.used_at = time.monotonic()

    async def wait(self) -> None:
        self.waiting += 1
        try:
            await self._throttler.acquire()  # type: ignore[no-untyped-call]
        finally:
            self.waiting -= 1
            self.used_at = time.monotonic()


class Admission:
    """Counts requests from arrival until they run.

    Args:
        max_queue: requests that may wait; one more is refused with `Overloaded`.
        rate: requests a second and API key, 0 for any number. A key's requests over its rate wait in the queue, up to
            one second's worth; more are refused, so that one caller cannot fill it.
    """

    def __init__(self, *, max_queue: int, rate: int = 0) -> None:
        self.max_queue = max_queue
        self.queued = 0
        self._rate = rate
        self._lanes: dict[str, _Lane] = {}
        self._left_at: float | None = None
        self._gap = 0.05  # seconds between two departures from a busy queue

    def enter(self, api_key: str) -> Ticket:
        """A place in the queue, or `Overloaded` with an estimate of when to come back."""
        if self.queued >= self.max_queue:
            raise Overloaded(
                f"the queue is full: {self.queued} requests wait, the limit is {self.max_queue}",
                retry_after=self._retry_after(),
            )
        lane = self._lane(api_key) if self._rate else None
        if lane is not None and lane.waiting >= self._rate:
            raise Overloaded(
                f"too many requests from one API key: the limit is {self._rate} a second, and {lane.waiting} wait",
                retry_after=max(MIN_RETRY, lane.waiting / self._rate),
            )
        self.queued += 1
        return Ticket(lane, self._depart)

    def _depart(self) -> None:
        now = time.monotonic()
        if self._left_at is not None and self.queued > 1:
            self._gap += SMOOTHING * (now - self._left_at - self._gap)
        self._left_at = now
        self.queued -= 1

    def _retry_after(self) -> float:
        """When about half of those waiting now should be gone."""
        return min(MAX_RETRY, max(MIN_RETRY, self._gap * self.queued / 2))

    def _lane(self, api_key: str) -> _Lane:
        if api_key not in self._lanes and len(self._lanes) >= MAX_IDLE_KEYS:
            stale = time.monotonic() - 1.0
            self._lanes = {key: lane for key, lane in self._lanes.items() if lane.waiting or lane.used_at > stale}
        return self._lanes.setdefault(api_key, _Lane(self._rate))
