"""One router's stream of calls. Requests are queued in the order in which they came and answered in that order.

The session owns what it opened: when the stream ends, however it ends, its sequences are closed and their pages free.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any

import structlog

from dspark.errors import DSparkError, InvalidRequest
from dspark.messages import Opened, OpenSequence, SequenceKey, StepResult
from dspark.rpc.codec import decode, verifier_reply
from dspark.v1 import verifier_pb2 as pb
from services.verifier.thread import EngineThread

__all__ = ["RouterSession"]

UNANSWERED = 64  # calls of one session, after which no more are read

Result = list[Opened] | StepResult | None

_log = structlog.get_logger(__name__)


class RouterSession:
    """Calls of one stream. `read` and `replies` run at the same time, on the event loop."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._answers: asyncio.Queue[tuple[int, asyncio.Future[Result]] | None] = asyncio.Queue(UNANSWERED)
        self._keys: set[SequenceKey] = set()  # open and ours; the engine's thread alone touches it
        self._ended = False

    async def read(self, requests: AsyncIterator[pb.VerifierRequest]) -> None:
        """Queue every request; returns, or raises, as the request stream ends."""
        try:
            async for request in requests:
                await self._answers.put((request.call_id, asyncio.wrap_future(self._start(request))))
        finally:
            await self._answers.put(None)

    async def replies(self) -> AsyncIterator[pb.VerifierReply]:
        """The reply to each request; the load in it is the present one."""
        while (entry := await self._answers.get()) is not None:
            call_id, answer = entry
            result: Result | DSparkError
            try:
                result = await answer
            except DSparkError as error:
                result = error
            yield verifier_reply(call_id, result, self._engine.load())

    def end(self) -> None:
        """Close what is still open. Idempotent."""
        if not self._ended:
            self._ended = True
            self._engine.leave(self)
            self._engine.submit(self._close_all)

    def _start(self, request: pb.VerifierRequest) -> Future[Any]:
        """Queue one request; what is wrong with it becomes its reply."""
        try:
            return self._queue(request)
        except DSparkError as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return failed

    def _queue(self, request: pb.VerifierRequest) -> Future[Any]:
        match request.WhichOneof("call"):
            case "step":
                return self._engine.step(decode(request.step), self)
            case "open":
                sequences = decode(request.open)
                return self._engine.submit(lambda: self._open(sequences))
            case "close":
                keys = decode(request.close)
                return self._engine.submit(lambda: self._close(keys))
            case _:
                raise InvalidRequest("the request holds no call: one of open, step, close")

    # ------------------------------------------------------------ in the engine's thread

    def _open(self, sequences: Sequence[OpenSequence]) -> list[Opened]:
        opened = self._engine.engine.open(sequences)
        for request, answer in zip(sequences, opened, strict=True):
            if answer.error is None:
                self._keys.add(answer.key)
            _log_open(request, answer)
        return opened

    def _close(self, keys: Sequence[SequenceKey]) -> None:
        self._engine.engine.close(keys)
        self._keys.difference_update(keys)

    def _close_all(self) -> None:
        if self._keys:
            _log.info("router left", sequences=len(self._keys))
        self._close(tuple(self._keys))


def _log_open(request: OpenSequence, answer: Opened) -> None:
    log = _log.bind(request_id=request.request_id, sequence=request.key.sequence_id, epoch=request.key.epoch)
    if answer.error is None:
        log.info("sequence opened", tokens=len(request.token_ids), cached=answer.computed_len)
    else:
        log.warning("sequence refused", reason=str(answer.error))
