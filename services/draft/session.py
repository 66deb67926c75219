"""One router's stream of calls, served side by side: a block that waits for its features holds nothing else up.

Replies to no call, with call_id 0, are the blocks of sequences that stay (`ProposeItem.stay`).

The session owns what it attached: when the stream ends, however it ends, its sequences are detached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import structlog

from dspark.errors import DSparkError, InternalError, InvalidRequest
from dspark.messages import Attached, AttachSequence, ProposeResult, SequenceKey
from dspark.rpc.codec import decode, draft_reply
from dspark.v1 import draft_pb2 as pb
from services.draft.worker import DraftWorker

__all__ = ["RouterSession"]

_UNANSWERED = 64  # calls of one session, after which no more are read

Result = Sequence[Attached] | ProposeResult | None

_log = structlog.get_logger(__name__)


class RouterSession:
    """Calls of one stream. `read` and `replies` run at the same time."""

    def __init__(self, worker: DraftWorker) -> None:
        self._worker = worker
        self._replies: asyncio.Queue[pb.DraftReply | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_UNANSWERED)
        self._calls: set[asyncio.Task[None]] = set()
        self._keys: set[SequenceKey] = set()
        self._ended = False

    async def read(self, requests: AsyncIterator[pb.DraftRequest]) -> None:
        """Start every call; returns, or raises, as the request stream ends and all are answered."""
        try:
            async for request in requests:
                await self._room.acquire()
                call = asyncio.create_task(self._answer(request))
                self._calls.add(call)
                call.add_done_callback(self._answered)
            if self._calls:
                await asyncio.wait(self._calls)
        finally:
            self._replies.put_nowait(None)

    async def replies(self) -> AsyncIterator[pb.DraftReply]:
        """Each reply as soon as it is there."""
        while (reply := await self._replies.get()) is not None:
            yield reply

    def end(self) -> None:
        """Give up what is unanswered and detach what is still attached. Idempotent."""
        if self._ended:
            return
        self._ended = True
        for call in self._calls:
            call.cancel()
        if self._keys:
            _log.info("router left", sequences=len(self._keys))
        self._worker.detach(self._keys)

    def _answered(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._room.release()

    async def _answer(self, request: pb.DraftRequest) -> None:
        result: Result | DSparkError
        try:
            result = await self._serve(request)
        except DSparkError as error:
            result = error
        except Exception as error:  # noqa: BLE001 - a bug answers this call and ends no other
            _log.exception("a call failed", call=request.WhichOneof("call"))
            result = InternalError(f"{type(error).__name__}: {error}")
        self._replies.put_nowait(draft_reply(request.call_id, result, self._worker.load()))

    async def _serve(self, request: pb.DraftRequest) -> Result:
        match request.WhichOneof("call"):
            case "propose":
                items, wait = decode(request.propose), request.propose.wait_seconds
                return await self._worker.propose(items, wait, self._deliver)
            case "attach":
                return await self._attach(decode(request.attach))
            case "detach":
                keys = decode(request.detach)
                self._keys.difference_update(keys)
                self._worker.detach(keys)
                return None
            case _:
                raise InvalidRequest("the request holds no call: one of attach, propose, detach")

    def _deliver(self, unasked: ProposeResult) -> None:
        self._replies.put_nowait(draft_reply(0, unasked, self._worker.load()))

    async def _attach(self, requests: Sequence[AttachSequence]) -> Sequence[Attached]:
        self._keys.update(request.key for request in requests)  # before: the stream may end meanwhile
        answers = await self._worker.attach(requests)
        self._keys.difference_update(answer.key for answer in answers if answer.error is not None)
        return answers
