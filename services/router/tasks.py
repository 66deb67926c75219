"""Background tasks that end with their owner, and faults that are logged and end nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

from dspark.ending import end

__all__ = ["Tasks", "guarded", "later"]

_log = structlog.get_logger(__name__)
T = TypeVar("T")


def guarded(function: Callable[[], object]) -> None:
    """One turn of a loop that must not end: a fault of ours is logged, and the next turn may do better."""
    try:
        function()
    except Exception:  # noqa: BLE001 - whatever it is
        _log.exception("a turn failed", function=getattr(function, "__qualname__", repr(function)))


def later(function: Callable[..., object], *arguments: Any, turns: int = 4) -> None:
    """Some turns of the loop from now: by then a request that is made next has gone through its session. `guarded`."""
    if turns:
        asyncio.get_running_loop().call_soon(partial(later, function, *arguments, turns=turns - 1))
    else:
        guarded(partial(function, *arguments))


class Tasks:
    """For `async with`; leaving the block cancels what still runs and waits for it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(*self._tasks)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs it; the event loop alone would hold it only weakly."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("background task failed", exc_info=error)
