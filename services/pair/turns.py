"""The thread of a verify engine as an executor, so that a draft engine can live in it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any

from dspark.errors import Unavailable
from services.verifier.thread import EngineThread

__all__ = ["Turns"]


class Turns(Executor):
    """What is submitted takes its turn among the engine's calls, between steps."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As any executor's. Where the thread has ended, the result is `Unavailable`."""
        return self._thread.submit(partial(function, *args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Returns once what was submitted has run. The thread is somebody else's, and goes on."""
        del cancel_futures
        if wait:
            with suppress(Unavailable):
                self._thread.submit(lambda: None).result()
