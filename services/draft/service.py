"""The draft worker's gRPC face: protobuf to plain values and back. What a router's stream does is in `session.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from dspark.messages import DrafterInfo
from dspark.rpc.codec import encode
from dspark.v1 import draft_pb2 as pb
from dspark.v1.draft_pb2_grpc import DraftServicer
from services.draft.session import RouterSession
from services.draft.worker import DraftWorker

__all__ = ["DraftService"]

Context = grpc.aio.ServicerContext[Any, Any]


class DraftService(DraftServicer):
    """Implements `dspark.v1.Draft` on a draft worker."""

    def __init__(self, worker: DraftWorker, *, worker_id: str, drafter: DrafterInfo) -> None:
        self._worker = worker
        self._worker_id = worker_id
        self._drafter = drafter

    async def Describe(self, _request: pb.DescribeDraftRequest, _context: Context) -> pb.DescribeDraftResponse:
        """Who this is."""
        return pb.DescribeDraftResponse(
            worker_id=self._worker_id, drafter=encode(self._drafter), load=encode(self._worker.load())
        )

    async def Session(self, requests: AsyncIterator[pb.DraftRequest], context: Context) -> AsyncIterator[pb.DraftReply]:
        """One router's calls."""
        session = RouterSession(self._worker)
        context.add_done_callback(_call(session.end))  # also where a cancelled call leaves us suspended
        reader = asyncio.create_task(session.read(requests))
        try:
            async for reply in session.replies():
                yield reply
            await reader
        finally:
            reader.cancel()
            session.end()


def _call(function: Callable[[], None]) -> Any:
    """The function as a callback of a finished call, whose argument says nothing new."""
    return lambda _: function()
