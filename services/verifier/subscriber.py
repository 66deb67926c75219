"""One draft worker's features: its wishes to the engine, the engine's blocks to it, with a bounded queue between.

What its stream carries is `FeatureSession`'s affair; a draft worker in the same process needs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from dspark.errors import InvalidRequest
from dspark.messages import FeatureBlock, SequenceKey
from dspark.rpc.codec import key_of
from dspark.v1 import verifier_pb2 as pb
from services.verifier.feed import FeatureStream
from services.verifier.thread import EngineThread

__all__ = ["FeatureSession", "Subscriber"]


class Subscriber:
    """A subscriber of the engine's feed. Any thread may call it."""

    def __init__(self, engine: EngineThread, limit_bytes: int, on_blocks: Callable[[], None]) -> None:
        """`on_blocks`: called in some thread where there is something to `take`."""
        self._engine = engine
        self._stream = FeatureStream(limit_bytes=limit_bytes, on_blocks=on_blocks, on_room=self._resume)
        self._ended = False

    def subscribe(self, key: SequenceKey, tap_id: str, position: int) -> None:
        """Have a sequence's features from a position on; what is wrong comes as a block with an error."""
        self._engine.submit(lambda: self._engine.engine.subscribe(self._stream, key, tap_id, position))

    def unsubscribe(self, key: SequenceKey) -> None:
        """Have no more of them."""
        self._engine.submit(lambda: self._engine.engine.unsubscribe(self._stream, key))

    def take(self) -> list[FeatureBlock]:
        """The oldest blocks, a message of them; empty where there are none."""
        return self._stream.take()

    def end(self) -> None:
        """No more blocks are wanted. Idempotent."""
        if not self._ended:
            self._ended = True
            self._engine.submit(lambda: self._engine.engine.leave(self._stream))

    def _resume(self) -> None:
        self._engine.submit(lambda: self._engine.engine.resume(self._stream))


class FeatureSession:
    """One draft worker's stream, on the event loop. `read` and `blocks` run side by side."""

    def __init__(self, engine: EngineThread, limit_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._subscriber = Subscriber(engine, limit_bytes, self._wake)

    async def read(self, requests: AsyncIterator[pb.FeatureRequest]) -> None:
        """Pass every wish on; what is wrong with one is answered as a block with an error."""
        async for request in requests:
            match request.WhichOneof("request"):
                case "subscribe":
                    wish = request.subscribe
                    self._subscriber.subscribe(key_of(wish), wish.tap_id, wish.from_position)
                case "unsubscribe":
                    self._subscriber.unsubscribe(key_of(request.unsubscribe))
                case _:
                    raise InvalidRequest("the request holds neither subscribe nor unsubscribe")

    async def blocks(self, reader: asyncio.Task[None]) -> AsyncIterator[list[FeatureBlock]]:
        """All blocks that are there, as they come, until the reader has ended and the queue is empty."""
        reader.add_done_callback(lambda _: self._arrived.set())
        while True:
            self._arrived.clear()
            while blocks := self._subscriber.take():
                yield blocks
            if reader.done():
                return
            await self._arrived.wait()

    def end(self) -> None:
        """No more blocks are wanted. Idempotent."""
        self._subscriber.end()

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._arrived.set)
