"""One draft worker's features stream: its wishes to the engine, the engine's blocks to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from dspark.errors import InvalidRequest
from dspark.messages import FeatureBlock, SequenceKey
from dspark.rpc.codec import key_of
from dspark.v1 import verifier_pb2 as pb
from services.verifier.feed import FeatureStream
from services.verifier.thread import EngineThread

__all__ = ["Subscriber"]


class Subscriber:
    """Between the event loop and the engine's thread, with a bounded queue. `read` and `blocks` run side by side."""

    def __init__(self, engine: EngineThread, limit_bytes: int) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._stream = FeatureStream(limit_bytes=limit_bytes, on_blocks=self._wake, on_room=self._resume)
        self._ended = False

    async def read(self, requests: AsyncIterator[pb.FeatureRequest]) -> None:
        """Pass every wish on; what is wrong with one is answered as a block with an error."""
        async for request in requests:
            match request.WhichOneof("request"):
                case "subscribe":
                    self._subscribe(key_of(request.subscribe), request.subscribe)
                case "unsubscribe":
                    self._unsubscribe(key_of(request.unsubscribe))
                case _:
                    raise InvalidRequest("the request holds neither subscribe nor unsubscribe")

    async def blocks(self, reader: asyncio.Task[None]) -> AsyncIterator[list[FeatureBlock]]:
        """All blocks that are there, as they come, until the reader has ended and the queue is empty."""
        reader.add_done_callback(lambda _: self._arrived.set())
        while True:
            self._arrived.clear()
            while blocks := self._stream.take():
                yield blocks
            if reader.done():
                return
            await self._arrived.wait()

    def end(self) -> None:
        """No more blocks are wanted. Idempotent."""
        if not self._ended:
            self._ended = True
            self._engine.submit(lambda: self._engine.engine.leave(self._stream))

    def _subscribe(self, key: SequenceKey, wish: pb.Subscribe) -> None:
        tap_id, position = wish.tap_id, wish.from_position
        self._engine.submit(lambda: self._engine.engine.subscribe(self._stream, key, tap_id, position))

    def _unsubscribe(self, key: SequenceKey) -> None:
        self._engine.submit(lambda: self._engine.engine.unsubscribe(self._stream, key))

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._arrived.set)

    def _resume(self) -> None:
        self._engine.submit(lambda: self._engine.engine.resume(self._stream))
