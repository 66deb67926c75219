"""Features of a verify worker in another process: its `Features` stream over gRPC, and our tap sent to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from dspark.errors import Unavailable
from dspark.rpc.channel import connect
from dspark.rpc.codec import decode
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierStub
from services.draft.link import VerifierLink, Wish

__all__ = ["WireLink"]

_RPC_SECONDS = 10.0


class WireLink(VerifierLink):
    """A link over a network."""

    async def _connected(self) -> None:
        async with connect(self.address) as channel:
            stub = VerifierStub(channel)
            await self._register(stub)
            outbox: asyncio.Queue[Wish] = asyncio.Queue()
            stream = stub.Features(self._requests(outbox))
            await stream.wait_for_connection()
            self._opened(outbox.put_nowait)
            async for reply in stream:
                for block in reply.blocks:
                    self.receive(decode(block))
        raise Unavailable("the verify worker ended the stream")

    async def _register(self, stub: VerifierStub) -> None:
        described = await stub.Describe(pb.DescribeVerifierRequest(), timeout=_RPC_SECONDS)
        self.offer.check(decode(described.model))
        if self.offer.tap is not None and self.offer.tap.tap_id not in described.tap_ids:
            await stub.RegisterTap(self.offer.messages(), timeout=_RPC_SECONDS)

    async def _requests(self, outbox: asyncio.Queue[Wish]) -> AsyncIterator[pb.FeatureRequest]:
        while True:
            yield self._request(await outbox.get())

    def _request(self, wish: Wish) -> pb.FeatureRequest:
        key, tap_id = wish.key, self.offer.drafter.tap_id
        if wish.position is None:
            return pb.FeatureRequest(unsubscribe=pb.Unsubscribe(sequence_id=key.sequence_id, epoch=key.epoch))
        subscribe = pb.Subscribe(
            sequence_id=key.sequence_id, epoch=key.epoch, tap_id=tap_id, from_position=wish.position
        )
        return pb.FeatureRequest(subscribe=subscribe)
