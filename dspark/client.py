"""The Python client. Talks to a router; needs neither torch nor any model file.

::

    async with Client("127.0.0.1:50051") as client:
        async for event in client.generate("The capital of France is", max_tokens=32):
            if isinstance(event, Delta):
                print(event.text, end="")

    with SyncClient("127.0.0.1:50051") as client:
        print(client.complete("The capital of France is", temperature=0).text)

Errors are those of `dspark.errors`: `InvalidRequest` where a parameter is out of its limits, `Overloaded` with
`retry_after` seconds where there is no room now, `Unavailable` where no router answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from dspark.errors import DSparkError, Unavailable
from dspark.events import (
    Completion,
    Delta,
    Event,
    Finished,
    Loads,
    ServerInfo,
    Started,
    Token,
    completion_of,
    event_of,
    loads_of,
    server_info_of,
)
from dspark.params import GenerateParams, Prompt, check_header, request_of
from dspark.rpc.channel import connect, error_from_call
from dspark.rpc.options import API_KEY, REQUEST_ID, check_address
from dspark.v1 import generation_pb2 as pb
from dspark.v1.generation_pb2_grpc import RouterStub

__all__ = [
    "Client",
    "Completion",
    "Delta",
    "Event",
    "Finished",
    "GenerateParams",
    "Prompt",
    "Started",
    "Stream",
    "SyncClient",
]

T = TypeVar("T")


class Stream:
    """A running completion: iterate over its events, or ask for the whole `completion()`.

    Leaving the `async with` block, `cancel()` and forgetting the stream all end it at the router within a round.
    """

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._events: list[Event] = []

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            response = await self._read()
            if response is grpc.aio.EOF:
                raise StopAsyncIteration
            if (event := event_of(response)) is not None:
                self._events.append(event)
                return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the completion now; without effect on one that has ended."""
        self._call.cancel()

    async def text(self) -> AsyncIterator[str]:
        """The text alone, piece by piece."""
        async for event in self:
            if isinstance(event, Delta) and event.text:
                yield event.text

    async def completion(self) -> Completion:
        """Everything, once the stream has ended; what was read before is in it too."""
        async for _ in self:
            pass
        return completion_of(self._events)

    async def _read(self) -> Any:
        try:
            return await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _named(error, self._address) from error


class Client:
    """A connection to a router at `host:port`, for `async with`. Safe for many concurrent requests.

    Args:
        address: `host:port` of the router.
        api_key: sent with every request, where a router limits each key's rate.
    """

    def __init__(self, address: str, *, api_key: str | None = None) -> None:
        check_address(address)
        check_header("api_key", api_key or "")
        self.address = address
        self._api_key = api_key

    async def __aenter__(self) -> Self:
        self._channel = connect(self.address)
        self._calls = RouterStub(self._channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._channel.close()
        finally:  # what gRPC keeps goes while its loop runs: left to the end of the program, its poller may never end
            del self._channel, self._calls

    @property
    def _stub(self) -> RouterStub:
        try:
            return self._calls
        except AttributeError:
            raise Unavailable(f"router {self.address}: this client is not open, use it in `async with`") from None

    def generate(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Stream:
        """Starts a completion and streams it: one `Started`, then `Delta`s, then one `Finished`."""
        request = request_of(prompt, params)
        metadata = [(REQUEST_ID, request.request_id)] if request.request_id else []
        call = self._stub.Generate(request, timeout=params.get("timeout"), metadata=self._metadata(metadata))
        return Stream(call, self.address)

    async def complete(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Completion:
        """The whole completion at once."""
        params.setdefault("whole", True)
        async with self.generate(prompt, **params) as stream:
            return await stream.completion()

    async def abort(self, request_id: str) -> bool:
        """Ends a request of any client; False where no such request runs."""
        response = await self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id))
        return bool(response.found)

    async def describe(self) -> ServerInfo:
        """What is served here."""
        return server_info_of(await self._call(self._stub.Describe, pb.DescribeRequest()))

    async def loads(self) -> Loads:
        """How busy the router and its workers are."""
        return loads_of(await self._call(self._stub.GetLoads, pb.GetLoadsRequest()))

    async def tokenize(self, text: str, *, special_tokens: bool = True, model: str = "") -> list[Token]:
        """The tokens of a text, with the model's first special token unless told otherwise."""
        request = pb.TokenizeRequest(model=model, text=text, no_special_tokens=not special_tokens)
        response = await self._call(self._stub.Tokenize, request)
        return [Token(i, piece) for i, piece in zip(response.token_ids, response.pieces, strict=True)]

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=30.0, metadata=self._metadata([]))
        except grpc.aio.AioRpcError as error:
            raise _named(error, self.address) from error

    def _metadata(self, entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [*entries, (API_KEY, self._api_key)] if self._api_key else entries


def _named(error: grpc.aio.AioRpcError, address: str) -> DSparkError:
    found = error_from_call(error)
    return Unavailable(f"router {address}: {found}") if isinstance(found, Unavailable) else found


class SyncClient:
    """`Client` for code without an event loop, for `with`: the same methods, blocking."""

    def __init__(self, address: str, *, api_key: str | None = None) -> None:
        self._client = Client(address, api_key=api_key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dspark-client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wait(self._client.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._wait(self._client.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Iterator[Event]:
        """`Client.generate`; closing the iterator ends the completion."""

        async def start() -> Stream:
            return self._client.generate(prompt, **params)

        async def following(stream: Stream) -> Event | None:
            return await anext(stream, None)

        stream = self._wait(start())
        try:
            while (event := self._wait(following(stream))) is not None:
                yield event
        finally:
            self._loop.call_soon_threadsafe(stream.cancel)

    def complete(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Completion:
        """`Client.complete`."""
        return self._wait(self._client.complete(prompt, **params))

    def abort(self, request_id: str) -> bool:
        """`Client.abort`."""
        return self._wait(self._client.abort(request_id))

    def describe(self) -> ServerInfo:
        """`Client.describe`."""
        return self._wait(self._client.describe())

    def loads(self) -> Loads:
        """`Client.loads`."""
        return self._wait(self._client.loads())

    def tokenize(self, text: str, *, special_tokens: bool = True, model: str = "") -> list[Token]:
        """`Client.tokenize`."""
        return self._wait(self._client.tokenize(text, special_tokens=special_tokens, model=model))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
