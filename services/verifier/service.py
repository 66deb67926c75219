"""The verify worker's gRPC face: protobuf to plain values and back, streams to engine calls. Computes nothing.

What a router's stream does is in `session.py`, a draft worker's in `subscriber.py`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import structlog

from dspark.errors import InvalidRequest
from dspark.messages import TapInfo
from dspark.rpc.codec import decode, encode
from dspark.rpc.pieces import join, split
from dspark.v1 import types_pb2
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierServicer
from services.verifier.session import RouterSession
from services.verifier.subscriber import FeatureSession
from services.verifier.taps import check_info, tensor_shapes, tensors_of
from services.verifier.thread import EngineThread

__all__ = ["VerifierService"]

Context = grpc.aio.ServicerContext[Any, Any]

_log = structlog.get_logger(__name__)


class VerifierService(VerifierServicer):
    """Implements `dspark.v1.Verifier` on an engine in its thread."""

    def __init__(
        self,
        engine: EngineThread,
        *,
        worker_id: str,
        page_size: int,
        files: dict[str, bytes],
        feature_queue_bytes: int = 8 << 20,
    ) -> None:
        """`files`: what FetchTokenizer sends; `feature_queue_bytes`: bound of each features stream's queue."""
        self._engine = engine
        self._worker_id = worker_id
        self._page_size = page_size
        self._files = files
        self._feature_queue_bytes = feature_queue_bytes

    async def Describe(self, _request: pb.DescribeVerifierRequest, _context: Context) -> pb.DescribeVerifierResponse:
        """Who this is."""
        engine = self._engine.engine
        return pb.DescribeVerifierResponse(
            worker_id=self._worker_id,
            model=encode(engine.info),
            page_size=self._page_size,
            max_step_tokens=engine.settings.max_step_tokens,
            tap_ids=engine.tap_ids,
            load=encode(self._engine.load()),
        )

    async def FetchTokenizer(
        self, _request: pb.FetchTokenizerRequest, _context: Context
    ) -> AsyncIterator[types_pb2.Piece]:
        """The tokenizer's files."""
        for name, data in self._files.items():
            for piece in split(name, data):
                yield piece

    async def RegisterTap(
        self, requests: AsyncIterator[pb.RegisterTapRequest], _context: Context
    ) -> pb.RegisterTapResponse:
        """Description first and checked first, then tensors no larger than it says."""
        info = await _tap_info(requests)
        check_info(info, self._engine.engine.info)
        sizes = {name: 4 * math.prod(shape) for name, shape in tensor_shapes(info).items()}
        parts = await join(_pieces(requests, sizes), max_bytes=sum(sizes.values()))
        tensors = tensors_of(info, parts)
        await self._engine.call(lambda: self._engine.engine.register_tap(info, tensors))
        _log.info("tap registered", tap_id=info.tap_id, layers=list(info.layer_ids), features=info.feature_size)
        return pb.RegisterTapResponse(tap_id=info.tap_id)

    async def Session(
        self, requests: AsyncIterator[pb.VerifierRequest], context: Context
    ) -> AsyncIterator[pb.VerifierReply]:
        """One router's calls."""
        session = RouterSession(self._engine)
        context.add_done_callback(_call(session.end))  # also where a cancelled call leaves us suspended
        reader = asyncio.create_task(session.read(requests))
        try:
            async for reply in session.replies():
                yield reply
            await reader
        finally:
            reader.cancel()
            session.end()

    async def Features(
        self, requests: AsyncIterator[pb.FeatureRequest], context: Context
    ) -> AsyncIterator[pb.FeatureReply]:
        """One draft worker's features."""
        session = FeatureSession(self._engine, self._feature_queue_bytes)
        context.add_done_callback(_call(session.end))
        reader = asyncio.create_task(session.read(requests))
        try:
            async for blocks in session.blocks(reader):
                yield pb.FeatureReply(blocks=[encode(block) for block in blocks])
            await reader
        finally:
            reader.cancel()
            session.end()


def _call(function: Callable[[], None]) -> Any:
    """The function as a callback of a finished call, whose argument says nothing new."""
    return lambda _: function()


async def _tap_info(requests: AsyncIterator[pb.RegisterTapRequest]) -> TapInfo:
    async for request in requests:
        if request.WhichOneof("part") == "info":
            info: TapInfo = decode(request.info)
            return info
        break
    raise InvalidRequest("the first message of RegisterTap holds no info")


async def _pieces(
    requests: AsyncIterator[pb.RegisterTapRequest], sizes: Mapping[str, int]
) -> AsyncIterator[types_pb2.Piece]:
    """The pieces, of tensors that belong to the tap and are as large as it says."""
    async for request in requests:
        if request.WhichOneof("part") != "piece":
            raise InvalidRequest("RegisterTap: a message after the first holds no piece")
        piece = request.piece
        if piece.name not in sizes:
            raise InvalidRequest(f"piece of {piece.name!r}: a tap has {', '.join(sizes)}")
        if piece.size != sizes[piece.name]:
            raise InvalidRequest(f"{piece.name}: {piece.size} bytes, float32 of its shape are {sizes[piece.name]}")
        yield piece
