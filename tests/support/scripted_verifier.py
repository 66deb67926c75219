"""A verify worker that only hands out features, and misbehaves when told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from torch import Tensor

from dspark.errors import DSparkError, FeaturesMissing, Mismatch, UnknownSequence
from dspark.messages import FeatureBlock, ModelInfo, SequenceKey, TapInfo
from dspark.rpc.codec import decode, encode, key_of
from dspark.rpc.server import serve
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierServicer, add_VerifierServicer_to_server
from support.drafting import block_of

Context = grpc.aio.ServicerContext[Any, Any]

MODEL = ModelInfo(
    name="scripted",
    architecture="qwen3",
    model_fingerprint="f00d",
    numerics_fingerprint="n",
    vocab_size=512,
    hidden_size=64,
    num_layers=6,
    max_context=4096,
)


@dataclass
class _Stream:
    outbox: asyncio.Queue[FeatureBlock] = field(default_factory=asyncio.Queue)
    wanted: dict[SequenceKey, int] = field(default_factory=dict)


class ScriptedVerifier(VerifierServicer):
    """`grow` makes positions of a sequence known and sends them; what was asked for is in `subscribed`.

    Features (n, 0) make a sequence whose blocks carry ids only.
    """

    def __init__(self, model: ModelInfo = MODEL) -> None:
        self.model = model
        self.registered: list[TapInfo] = []
        self.subscribed: list[tuple[SequenceKey, int]] = []
        self.unsubscribed: list[SequenceKey] = []
        self.taps_wanted: set[str] = set()
        self._features: dict[SequenceKey, Tensor] = {}
        self._lengths: dict[SequenceKey, int] = {}
        self._streams: list[_Stream] = []

    def open(self, key: SequenceKey, features: Tensor, length: int = 0) -> None:
        """The sequence exists, its first `length` positions are known."""
        self._features[key] = features
        self._lengths[key] = length

    def grow(self, key: SequenceKey, length: int, *, lose: int = 0) -> None:
        """More positions are known; the first `lose` of the new ones are never sent, unless asked for."""
        self._lengths[key] = length
        for stream in self._streams:
            if key in stream.wanted:
                stream.wanted[key] += lose
                self._send(stream, key)

    def tell(self, key: SequenceKey, error: DSparkError) -> None:
        """Send an error about a sequence to whoever wants it."""
        for stream in self._streams:
            if key in stream.wanted:
                stream.outbox.put_nowait(FeatureBlock(key, 0, 0, error=error))

    def send(self, block: FeatureBlock) -> None:
        """Send anything to everybody."""
        for stream in self._streams:
            stream.outbox.put_nowait(block)

    def forget_taps(self) -> None:
        """As after a restart."""
        self.registered.clear()

    async def Describe(self, _request: pb.DescribeVerifierRequest, _context: Context) -> pb.DescribeVerifierResponse:
        taps = [info.tap_id for info in self.registered]
        return pb.DescribeVerifierResponse(worker_id="v", model=encode(self.model), page_size=16, tap_ids=taps)

    async def RegisterTap(
        self, requests: AsyncIterator[pb.RegisterTapRequest], _context: Context
    ) -> pb.RegisterTapResponse:
        info: TapInfo | None = None
        async for request in requests:
            if request.WhichOneof("part") == "info":
                info = decode(request.info)
        assert info is not None
        self.registered.append(info)
        return pb.RegisterTapResponse(tap_id=info.tap_id)

    async def Features(self, requests: AsyncIterator[pb.FeatureRequest], _context: Context) -> AsyncIterator[Any]:
        stream = _Stream()
        self._streams.append(stream)
        reader = asyncio.create_task(self._read(requests, stream))
        try:
            while True:
                blocks = [await stream.outbox.get()]
                while not stream.outbox.empty():
                    blocks.append(stream.outbox.get_nowait())
                yield pb.FeatureReply(blocks=[encode(block) for block in blocks])
        finally:
            reader.cancel()
            self._streams.remove(stream)

    async def _read(self, requests: AsyncIterator[pb.FeatureRequest], stream: _Stream) -> None:
        async for request in requests:
            if request.WhichOneof("request") == "unsubscribe":
                self.unsubscribed.append(key_of(request.unsubscribe))
                stream.wanted.pop(key_of(request.unsubscribe), None)
                continue
            key, start = key_of(request.subscribe), request.subscribe.from_position
            self.subscribed.append((key, start))
            self.taps_wanted.add(request.subscribe.tap_id)
            if request.subscribe.tap_id not in ["", *(info.tap_id for info in self.registered)]:
                stream.outbox.put_nowait(FeatureBlock(key, 0, 0, error=Mismatch("no such tap")))
            elif key not in self._features:
                stream.outbox.put_nowait(FeatureBlock(key, 0, 0, error=UnknownSequence("not open")))
            else:
                stream.wanted[key] = start
                self._send(stream, key)

    def _send(self, stream: _Stream, key: SequenceKey) -> None:
        start, end = stream.wanted[key], self._lengths[key]
        if start < end:
            stream.outbox.put_nowait(block_of(key, self._features[key], start, end))
            stream.wanted[key] = end
        else:
            stream.outbox.put_nowait(FeatureBlock(key, start, 0, error=FeaturesMissing("being recomputed")))


@asynccontextmanager
async def running(verifier: ScriptedVerifier, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Its address."""
    servicer = (add_VerifierServicer_to_server, verifier, "dspark.v1.Verifier")
    async with serve(address, [servicer], grace=0.0) as server:
        yield f"127.0.0.1:{server.port}"
