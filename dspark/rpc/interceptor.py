"""Turns what handlers raise into statuses, and refuses bytes that are no message. Knows no service's logic."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from dspark.errors import DSparkError, InternalError, InvalidRequest, Overloaded, Unavailable, status_code
from dspark.rpc.options import REQUEST_ID, RETRY_AFTER

__all__ = ["ErrorInterceptor"]

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

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
        self._sessions: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        return None if handler is None else self._wrap(handler, handler_call_details.method)

    def end_sessions(self) -> None:
        """Ends calls that stream both ways with UNAVAILABLE: they have no end of their own to wait for."""
        self._stopping = True
        for task in self._sessions:
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
        check = _checked_stream if handler.request_streaming else _checked
        guard = self._guard_generator if inspect.isasyncgenfunction(behaviour) else self._guard_coroutine
        return _FACTORIES[streams](
            guard(behaviour, check, method, all(streams)),
            request_deserializer=_tolerant(handler.request_deserializer, method),
            response_serializer=handler.response_serializer,
        )

    def _guard_coroutine(self, behaviour: Any, check: Any, method: str, session: bool) -> Any:
        async def call(request: Any, context: Any) -> Any:
            async with self._call(context, method, session=session):
                return await behaviour(check(request), context)

        return call

    def _guard_generator(self, behaviour: Any, check: Any, method: str, session: bool) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            async with (
                self._call(context, method, session=session),
                aclosing(behaviour(check(request), context)) as replies,
            ):
                async for reply in replies:
                    yield reply

        return call

    @asynccontextmanager
    async def _call(self, context: Any, method: str, *, session: bool) -> AsyncIterator[None]:
        """Around a handler's body: its request id, its place among the running, and what becomes of its errors."""
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(self._calls.discard)
        self._calls.add(task)
        if session:
            task.add_done_callback(self._sessions.discard)
            self._sessions.add(task)
        _bind_request_id(context)
        try:
            yield
        except asyncio.CancelledError:
            if not (session and self._stopping):
                raise
            await _abort(context, Unavailable("the server is stopping"), method)
        except Exception as error:  # noqa: BLE001 - the edge of the process: everything becomes a status
            await _abort(context, error, method)


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


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


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
