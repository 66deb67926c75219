"""Turns what handlers raise into statuses, and refuses bytes that are no message. Knows no service's logic."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from dspark.errors import DSparkError, InternalError, InvalidRequest, Overloaded, Unavailable, status_code
from dspark.rpc.options import REQUEST_ID, RETRY_AFTER

__all__ = ["ErrorInterceptor"]

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

_STOPPING = "the server is stopping"

_log = structlog.get_logger(__name__)
_FACTORIES = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request whose bytes are no message of the expected type."""

    reason: str


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server.

    A `DSparkError` ends the call with the status of `dspark.errors.status_code`, an `Overloaded` with its retry hint
    in the trailing metadata; any other exception is logged and becomes INTERNAL. Undecodable requests are
    INVALID_ARGUMENT, also in the middle of a request stream, where reading them raises `InvalidRequest`.
    Handlers take their requests from the request iterator, never from `context.read()`.
    """

    def __init__(self) -> None:
        self._calls: set[asyncio.Task[Any]] = set()
        self._sessions: dict[asyncio.Task[Any], _Requests] = {}
        self._stopping = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(handler, handler_call_details.method)

    async def end_sessions(self, seconds: float) -> None:
        """Ends calls that stream both ways with UNAVAILABLE: they have no end of their own to wait for.

        What they have read they answer first, as if the caller had ended the stream, for so many seconds at most.
        """
        self._stopping = True
        sessions = list(self._sessions)
        for requests in self._sessions.values():
            requests.end()
        if sessions:
            _, late = await asyncio.wait(sessions, timeout=seconds)
            for task in late:
                task.cancel()

    async def wait(self, seconds: float) -> None:
        """Returns when no handler runs any more, or after so many seconds."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=seconds)

    def _wrap(self, handler: Any, method: str) -> Handler:
        streams = (bool(handler.request_streaming), bool(handler.response_streaming))
        behaviour = {
            (False, False): handler.unary_unary,
            (False, True): handler.unary_stream,
            (True, False): handler.stream_unary,
            (True, True): handler.stream_stream,
        }[streams]
        guard = self._guard_generator if inspect.isasyncgenfunction(behaviour) else self._guard_coroutine
        return _FACTORIES[streams](
            guard(behaviour, streams, method),
            request_deserializer=_tolerant(handler.request_deserializer, method),
            response_serializer=handler.response_serializer,
        )

    def _guard_coroutine(self, behaviour: Any, streams: tuple[bool, bool], method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            request = _Requests(request) if streams[0] else request
            async with self._call(context, method, request if all(streams) else None):
                return await behaviour(_checked(request), context)

        return call

    def _guard_generator(self, behaviour: Any, streams: tuple[bool, bool], method: str) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            request = _Requests(request) if streams[0] else request
            async with (
                self._call(context, method, request if all(streams) else None),
                aclosing(behaviour(_checked(request), context)) as replies,
            ):
                async for reply in replies:
                    yield reply

        return call

    @asynccontextmanager
    async def _call(self, context: Any, method: str, session: _Requests | None) -> AsyncIterator[None]:
        """Around a handler's body: its request id, its place among the running, and what becomes of its errors."""
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._calls.discard)
        self._calls.add(task)
        if session is not None:
            task.add_done_callback(self._sessions.pop)
            self._sessions[task] = session
            if self._stopping:
                session.end()
        _bind_request_id(context)
        try:
            yield
        except asyncio.CancelledError:
            if session is None or not self._stopping:
                raise
            await _abort(context, Unavailable(_STOPPING), method)
        except Exception as error:  # noqa: BLE001 - the edge of the process: everything becomes a status
            await _abort(context, error, method)
        else:
            if session is not None and session.cut:
                await _abort(context, Unavailable(_STOPPING), method)


def _tolerant(deserialize: Callable[[bytes], Any], method: str) -> Callable[[bytes], Any]:
    """A deserializer that returns a marker where the original raises: an exception in it would become UNKNOWN."""

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError) as error:
            return _Undecodable(f"request of {method}: {len(data)} bytes are not a valid message ({error})")

    return decode


def _checked(request: Any) -> Any:
    if isinstance(request, _Undecodable):
        raise InvalidRequest(request.reason)
    return request


class _Requests:
    """The requests of a stream, checked. Ends as the caller ends it, or where the server does (`end`).

    Each is read in a task of its own, which nobody cancels: gRPC writes what comes next to where its read says so.
    """

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests
        self._read: asyncio.Future[Any] | None = None  # of the next one
        self._waiter: asyncio.Future[None] | None = None  # of whoever waits for it
        self._ended = False
        self.cut = False
        """The handler was told of an end that is the server's."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._read is None and not self._ended:
            self._read = asyncio.ensure_future(_next(self._requests))
            self._read.add_done_callback(self._wake)
        if self._read is not None and not self._read.done() and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._read is None or not self._read.done():
            self.cut = True
            raise StopAsyncIteration
        read, self._read = self._read, None
        if (request := read.result()) is _NO_MORE:
            raise StopAsyncIteration
        return _checked(request)

    def end(self) -> None:
        """Nothing is read that has not come yet."""
        self._ended = True
        self._wake()

    def _wake(self, read: asyncio.Future[Any] | None = None) -> None:
        if read is not None and not read.cancelled():
            read.exception()  # told to whoever asks; if nobody does any more, it is no news
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_NO_MORE = object()


async def _next(requests: AsyncIterator[Any]) -> Any:
    """The next request, or `_NO_MORE`: a task cannot raise StopAsyncIteration."""
    async for request in requests:
        return request
    return _NO_MORE


def _bind_request_id(context: Any) -> None:
    """Every call runs in a task of its own, so what is bound here ends with it."""
    for key, value in context.invocation_metadata() or ():
        if key == REQUEST_ID:
            structlog.contextvars.bind_contextvars(request_id=value)


async def _abort(context: Any, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):  # the handler chose its status itself
        raise error
    if not isinstance(error, DSparkError):
        _log.exception("unexpected error in a handler", method=method)
        error = InternalError(f"internal error in {method}: {type(error).__name__}: {error}")
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Overloaded):
        trailing = ((RETRY_AFTER, str(round(error.retry_after * 1000))),)
    await context.abort(status_code(error), str(error), trailing)
    raise AssertionError("abort raises")
