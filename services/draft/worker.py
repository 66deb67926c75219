"""A draft worker without its wire: sequences come and go, features flow in, blocks are drafted in one engine thread.

Whatever has gathered while the engine was busy is done in its next job, features first: calls of several routers share
one forward. K/V of the context is computed with the next block that needs it, or once enough has gathered: on cores
that both services share, a job for every few rows would hold up the verifier's step at each of its parallel regions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeVar

import structlog

from dspark.errors import DSparkError, FeaturesMissing, InternalError, StaleMessage, Unavailable, UnknownSequence
from dspark.messages import (
    Attached,
    AttachSequence,
    FeatureBlock,
    Proposal,
    ProposeItem,
    ProposeResult,
    SequenceKey,
    WorkerLoad,
)
from services.draft.engine import DraftEngine
from services.draft.inbox import FeatureInbox
from services.draft.intake import FeatureIntake
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer

__all__ = ["DraftWorker"]

GATHERED = 512  # positions: fewer wait for the next block that is asked for, and are computed with it
_LONGEST_WAIT = 10.0  # seconds; a router that asks for more is told what came by then

_log = structlog.get_logger(__name__)
ResultT = TypeVar("ResultT")


@dataclass(eq=False, slots=True)
class _Call:
    """One Propose on its way through the engine."""

    items: Sequence[ProposeItem]
    result: asyncio.Future[ProposeResult]
    ready_at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class _Done:
    """What one engine job came to."""

    pulls: Sequence[SequenceKey]
    result: ProposeResult | None
    started_at: float


class DraftWorker:
    """For `async with`. All methods run on the event loop; the engine is touched by its own thread only."""

    def __init__(
        self,
        engine: DraftEngine,
        offer: TapOffer,
        *,
        metrics: DraftMetrics,
        present: Callable[[], Iterable[str]] = tuple,
        connect_seconds: float = 5.0,
        linger_seconds: float = 30.0,
        executor: Executor | None = None,
    ) -> None:
        """`present`, `connect_seconds`, `linger_seconds`: as `FeatureIntake` takes them.

        `executor`: of one thread, the engine's.
        """
        self._executor = executor or ThreadPoolExecutor(1, "draft-engine")
        self._engine = engine
        self._metrics = metrics
        self._inbox = FeatureInbox(self._kick)
        self._intake = FeatureIntake(
            offer, self._inbox, present=present, connect_seconds=connect_seconds, linger_seconds=linger_seconds
        )
        self._sequences: dict[str, AttachSequence] = {}
        self._calls: list[_Call] = []
        self._busy = False
        self._closed = False
        self._empty = asyncio.Event()
        self.draining = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._intake.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        await self._intake.__aexit__(kind, error, trace)
        await asyncio.to_thread(self._executor.shutdown)

    async def drain(self, seconds: float) -> None:
        """Attach nothing new; returns when nothing is attached any more, at the latest after so many seconds."""
        self.draining = True
        self._empty.clear()
        self._note_empty()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()

    def load(self) -> WorkerLoad:
        """What the worker is doing now; may be read from any thread."""
        load = replace(
            self._engine.load(), running=len(self._sequences), waiting=len(self._calls), draining=self.draining
        )
        self._metrics.show(load, self._intake.connected)
        return load

    # ------------------------------------------------------------ sequences

    async def attach(self, requests: Sequence[AttachSequence]) -> list[Attached]:
        """Take sequences on: room for their context, and their features from the verify worker named."""
        return list(await asyncio.gather(*(self._attach(request) for request in requests)))

    async def _attach(self, request: AttachSequence) -> Attached:
        try:
            await self._take_on(request)
        except DSparkError as error:
            _log.warning("attach refused", **_names(request), reason=str(error))
            return Attached(request.key, error)
        _log.debug("attached", **_names(request), verifier=request.verifier_address)
        return Attached(request.key)

    async def _take_on(self, request: AttachSequence) -> None:
        if self.draining:
            raise Unavailable("this draft worker is draining: attach elsewhere")
        present = self._sequences.get(request.key.sequence_id)
        if present == request:
            return
        if present is not None:
            self._check_newer(present, request)
            self.detach([present.key])
        self._sequences[request.key.sequence_id] = request
        self._inbox.open(request.key)
        try:
            await self._in_engine(lambda: self._engine.attach(request))
            self._check_attached(request.key)
            await self._intake.subscribe(request.key, request.verifier_address)
        except BaseException:
            self.detach([request.key])
            raise

    def _check_attached(self, key: SequenceKey) -> None:
        if not self._attached(key):
            raise StaleMessage(f"{_describe(key)}: replaced or let go while it was attached")

    @staticmethod
    def _check_newer(present: AttachSequence, request: AttachSequence) -> None:
        if request.key.epoch < present.key.epoch:
            raise StaleMessage(f"{_describe(request.key)}: epoch {present.key.epoch} is attached here")

    def detach(self, keys: Iterable[SequenceKey]) -> None:
        """Forget sequences; unknown and already replaced ones are passed over."""
        gone = [key for key in keys if self._attached(key)]
        for key in gone:
            del self._sequences[key.sequence_id]
            self._intake.unsubscribe(key)
            self._inbox.close(key)
        if gone and not self._closed:
            self._in_engine(lambda: self._engine.detach(gone))
        self._note_empty()

    def _note_empty(self) -> None:
        if not self._sequences:
            self._empty.set()

    def _attached(self, key: SequenceKey) -> bool:
        request = self._sequences.get(key.sequence_id)
        return request is not None and request.key == key

    # ------------------------------------------------------------ drafting

    async def propose(self, items: Sequence[ProposeItem], wait_seconds: float) -> ProposeResult:
        """One block for each item, in order; an item that cannot be served carries its error.

        Waits up to `wait_seconds` for features up to position committed_len - 2, then drafts for those that have them.
        """
        asked_at = time.perf_counter()
        needs = {item.key: item.committed_len - 1 for item in items if self._attached(item.key)}
        await self._inbox.wait(needs, max(0.0, min(_LONGEST_WAIT, wait_seconds)))
        refused = {index: error for index, item in enumerate(items) if (error := self._refusal(item)) is not None}
        waited = time.perf_counter() - asked_at
        result = await self._draft([item for index, item in enumerate(items) if index not in refused])
        proposals = _merge(items, refused, iter(result.proposals))
        answer = replace(result, proposals=proposals, feature_wait_seconds=waited)
        self._metrics.missed(sum(isinstance(proposal.error, FeaturesMissing) for proposal in proposals))
        self._metrics.answered(answer)
        return answer

    def _refusal(self, item: ProposeItem) -> DSparkError | None:
        """Why an item cannot be drafted for now, as far as the loop knows."""
        request = self._sequences.get(item.key.sequence_id)
        if request is None:
            return UnknownSequence(f"{_describe(item.key)} is not attached here")
        if request.key.epoch != item.key.epoch:
            return StaleMessage(f"{_describe(item.key)}: epoch {request.key.epoch} is attached here")
        length = self._inbox.length(item.key) or 0
        if length >= item.committed_len - 1:
            return None
        self._intake.pull(item.key)
        return FeaturesMissing(
            f"{_describe(item.key)}: features of {length} positions are here, {item.committed_len - 1} are needed"
        )

    async def _draft(self, items: Sequence[ProposeItem]) -> ProposeResult:
        if not items:
            return ProposeResult(())
        call = _Call(items, self._loop.create_future())
        self._calls.append(call)
        self._kick()
        return await call.result

    # ------------------------------------------------------------ the engine's thread

    def _in_engine(self, work: Callable[[], ResultT]) -> asyncio.Future[ResultT]:
        return self._loop.run_in_executor(self._executor, work)

    def _kick(self) -> None:
        """Start a job with all that waits, unless one is running: it will be followed by another."""
        if self._busy or self._closed or not (self._calls or self._inbox.pressing or len(self._inbox) >= GATHERED):
            return
        self._busy = True
        calls, self._calls = self._calls, []
        blocks = self._inbox.take()
        self._metrics.received(sum(block.count for block in blocks))
        job = self._in_engine(lambda: self._job(blocks, [item for call in calls for item in call.items]))
        job.add_done_callback(lambda done: self._finished(done, calls, blocks))

    def _job(self, blocks: Sequence[FeatureBlock], items: Sequence[ProposeItem]) -> _Done:
        started_at = time.perf_counter()
        pulls = self._engine.append_features(blocks)
        return _Done(pulls, self._engine.propose(items) if items else None, started_at)

    def _finished(self, job: asyncio.Future[_Done], calls: Sequence[_Call], blocks: Sequence[FeatureBlock]) -> None:
        self._busy = False
        if job.cancelled():
            return
        failure = job.exception()
        if failure is not None:
            self._failed(failure, calls, blocks)
        else:
            self._answer(job.result(), calls)
        self._kick()

    def _answer(self, done: _Done, calls: Sequence[_Call]) -> None:
        for key in done.pulls:
            self._pull_from_engine_length(key)
        if done.result is None:
            return
        self._metrics.drafted(done.result)
        proposals = iter(done.result.proposals)
        for call in calls:
            own = tuple(next(proposals) for _ in call.items)
            queued = max(0.0, done.started_at - call.ready_at)
            others = len(done.result.proposals) - len(own)
            _resolve(call.result, replace(done.result, proposals=own, queue_seconds=queued, other_requests=others))

    def _failed(self, failure: BaseException, calls: Sequence[_Call], blocks: Sequence[FeatureBlock]) -> None:
        """A bug or a device error: these calls fail, and what was to be appended is fetched again."""
        _log.error("engine job failed", exc_info=failure)
        for call in calls:
            if not call.result.done():
                call.result.set_exception(InternalError(f"drafting failed: {type(failure).__name__}: {failure}"))
        for key in {block.key for block in blocks}:
            self._pull_from_engine_length(key)

    def _pull_from_engine_length(self, key: SequenceKey) -> None:
        length = self._engine.length(key)
        if length is not None:
            self._inbox.rewind(key, length)
            self._intake.pull(key)


def _resolve(future: asyncio.Future[ResultT], result: ResultT) -> None:
    if not future.done():  # the call was cancelled: its router is gone
        future.set_result(result)


def _merge(
    items: Sequence[ProposeItem], refused: dict[int, DSparkError], drafted: Iterator[Proposal]
) -> tuple[Proposal, ...]:
    return tuple(
        Proposal(item.key, item.committed_len, error=refused[index]) if index in refused else next(drafted)
        for index, item in enumerate(items)
    )


def _describe(key: SequenceKey) -> str:
    return f"sequence {key.sequence_id!r} epoch {key.epoch}"


def _names(request: AttachSequence) -> dict[str, object]:
    return {"request_id": request.request_id, "sequence": request.key.sequence_id, "epoch": request.key.epoch}
