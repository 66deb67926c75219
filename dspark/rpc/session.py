"""Many concurrent calls over one bidirectional stream, both ends of it. Knows nothing of what the calls mean."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import grpc
import structlog

from dspark.ending import end
from dspark.errors import DeadlineExceeded, Unavailable
from dspark.rpc.codec import decode_error

__all__ = ["Session", "answer"]

_log = structlog.get_logger(__name__)


class _Numbered(Protocol):
    call_id: int


RequestT = TypeVar("RequestT", bound=_Numbered)
ReplyT = TypeVar("ReplyT", bound=_Numbered)


class Session(Generic[RequestT, ReplyT]):
    """A worker's `Session` stream, for `async with`.

    ::

        async with Session(VerifierStub(channel).Session, name=address) as session:
            reply = await session.call(step_call(items), timeout=2.0)

    Replies may come in any order; `call_id` tells whose they are. When the stream breaks, every pending and later
    call raises `Unavailable`, and `broken` is set.
    """

    def __init__(self, open_stream: Callable[..., Any], *, name: str = "worker", metadata: Any = None) -> None:
        self._open_stream = open_stream
        self._name = name
        self._metadata = metadata
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[ReplyT]] = {}
        self._outbox: asyncio.Queue[RequestT] = asyncio.Queue()
        self._failure: Unavailable | None = None
        self.on_unasked: Callable[[ReplyT], None] = _dropped
        """Given replies to no call, whose call_id is 0."""
        self.broken = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._stream = self._open_stream(metadata=self._metadata)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fail(f"{self._name}: the session was closed")
        self._stream.cancel()
        await end(*self._tasks)

    async def call(self, request: RequestT, *, timeout: float | None = None) -> ReplyT:  # noqa: ASYNC109 - per call, as gRPC's own
        """Sends the request under a fresh call_id and returns its reply.

        The reply's own error is raised where the whole call was refused. `DeadlineExceeded` after `timeout` seconds;
        the late reply is dropped. `Unavailable` once the stream is broken.
        """
        if self._failure is not None:
            raise Unavailable(str(self._failure))
        request.call_id = next(self._ids)
        reply: asyncio.Future[ReplyT] = asyncio.get_running_loop().create_future()
        self._pending[request.call_id] = reply
        try:
            async with asyncio.timeout(timeout):
                self._outbox.put_nowait(request)
                answer = await reply
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self._name}: no answer within {timeout} s") from error
        finally:
            del self._pending[request.call_id]
            reply.cancel()
        if (refusal := decode_error(answer)) is not None:
            raise refusal
        return answer

    async def _write(self) -> None:
        """A task of its own: gRPC takes one message at a time, and cancelling a write would cancel the whole stream.

        Its failures are left to the reader, which learns the status and fails every pending call alike.
        """
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            while True:
                await self._stream.write(await self._outbox.get())

    async def _read(self) -> None:
        try:
            async for reply in self._stream:
                if reply.call_id == 0:
                    self._tell(reply)
                    continue
                future = self._pending.get(reply.call_id)
                if future is not None and not future.done():
                    future.set_result(reply)
            reason = "the worker ended the session"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        self._fail(f"{self._name}: {reason}")

    def _tell(self, reply: ReplyT) -> None:
        """A fault in whoever listens must not end the reading."""
        try:
            self.on_unasked(reply)
        except Exception:  # noqa: BLE001 - calls go on without it
            _log.exception("a reply to no call was lost", session=self._name)

    def _fail(self, reason: str) -> None:
        if self._failure is None:
            self._failure = Unavailable(reason)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(Unavailable(str(self._failure)))
        self.broken.set()


def _dropped(_reply: object) -> None:
    """Nobody wants them."""


async def answer(
    requests: AsyncIterator[RequestT], handle: Callable[[RequestT], Awaitable[ReplyT]]
) -> AsyncGenerator[ReplyT, None]:
    """The worker's end: the body of a `Session` handler.

    Each request is handled in a task of its own, started in the order of arrival; replies leave as they are ready.
    What reading the stream or `handle` raises ends the session with that error; a call's refusal is a reply, not an
    exception. When the caller ends or leaves, running handlers are cancelled. ::

        async def Session(self, request_iterator, context):
            async with aclosing(answer(request_iterator, self._handle)) as replies:
                async for reply in replies:
                    yield reply
    """
    answering = _Answering(requests, handle)
    try:
        while (reply := await answering.outbox.get()) is not None:
            if isinstance(reply, Exception):
                raise reply
            yield reply
    finally:
        answering.cancel()


class _Answering(Generic[RequestT, ReplyT]):
    """The tasks of one session: one reads, one more for each call in progress."""

    def __init__(self, requests: AsyncIterator[RequestT], handle: Callable[[RequestT], Awaitable[ReplyT]]) -> None:
        self._requests = requests
        self._handle = handle
        self._handlers: set[asyncio.Task[None]] = set()
        self.outbox: asyncio.Queue[ReplyT | Exception | None] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for request in self._requests:
                task = asyncio.create_task(self._answer(request))
                self._handlers.add(task)
                task.add_done_callback(self._handlers.discard)
            await asyncio.gather(*self._handlers)
            self.outbox.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - raised again where the replies are read
            self.outbox.put_nowait(error)

    async def _answer(self, request: RequestT) -> None:
        try:
            self.outbox.put_nowait(await self._handle(request))
        except Exception as error:  # noqa: BLE001 - raised again where the replies are read
            self.outbox.put_nowait(error)

    def cancel(self) -> None:
        for task in (self._reader, *self._handlers):
            task.cancel()
