"""The engine's thread: what it is given to do, and when.

Whatever has gathered while the engine was busy is done in its next job, features first: calls of several routers share
one forward, and what is drafted unasked (`standing.py`) is in it as well. K/V of a context is computed with the next
block behind it: on cores that both services share, a job for every few rows would hold up the verifier's step at each
of its parallel regions, and of sequences that nobody drafts for none is ever needed. Too much of that is computed
piece by piece, so that what a first block has to wait for is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import structlog

from dspark.errors import InternalError
from dspark.messages import FeatureBlock, ProposeItem, ProposeResult, SequenceKey
from services.draft.engine import DraftEngine
from services.draft.inbox import FeatureInbox
from services.draft.metrics import DraftMetrics
from services.draft.standing import Deliver, StandingOrders

__all__ = ["EngineJobs"]

GATHERED = 4096  # positions: fewer wait for a block behind them
PIECE = 512  # positions computed at a time where more have gathered
TELLING = 0.001  # seconds in which routers hear of blocks before anything is learned of them

_log = structlog.get_logger(__name__)
ResultT = TypeVar("ResultT")


@dataclass(eq=False, slots=True)
class _Call:
    """Blocks to draft, asked for or not, on their way through the engine."""

    items: Sequence[ProposeItem]
    result: asyncio.Future[ProposeResult]
    ready_at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class _Done:
    """What one engine job came to."""

    pulls: Sequence[SequenceKey]
    result: ProposeResult | None
    learn: Callable[[], None]
    started_at: float


class EngineJobs:
    """On the event loop; the engine is touched by its own thread only."""

    def __init__(
        self,
        engine: DraftEngine,
        standing: StandingOrders,
        executor: Executor,
        metrics: DraftMetrics,
        *,
        incomplete: Callable[[SequenceKey, int], None],
    ) -> None:
        """`executor`: of one thread, the engine's.

        `incomplete`: told of a sequence whose features were lost, and how many positions the engine has.
        """
        self.inbox = FeatureInbox(self._kick_soon)
        self._engine = engine
        self._standing = standing
        self._executor = executor
        self._metrics = metrics
        self._incomplete = incomplete
        self._calls: list[_Call] = []
        self._looked_at: set[SequenceKey] = set()
        self._kicked = False
        self._busy = False
        self.closed = False

    @property
    def waiting(self) -> int:
        """Calls that wait for the engine."""
        return len(self._calls)

    async def close(self) -> None:
        """Finishes the job that runs; no other follows."""
        self.closed = True
        await asyncio.to_thread(self._executor.shutdown)

    def submit(self, work: Callable[[], ResultT]) -> asyncio.Future[ResultT]:
        """Any work with the engine, in its turn."""
        return asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def draft(self, items: Sequence[ProposeItem]) -> ProposeResult:
        """A block for each item, whose features are in the inbox. `InternalError` where the engine fails."""
        if not items:
            return ProposeResult(())
        call = _Call(items, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        self._kick()
        return await call.result

    def look_at(self, key: SequenceKey) -> None:
        """It has an order now that its features may be there for."""
        self._looked_at.add(key)
        self._kick_soon()

    # ------------------------------------------------------------ one job after another

    def _kick_soon(self) -> None:
        """Once all that came in one message is in the inbox."""
        if not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._kick)

    def _kick(self) -> None:
        """Start a job with all that waits, unless one is running: it will be followed by another."""
        self._kicked = False
        if self._busy or self.closed or not self._pressing():
            return
        self._busy = True
        calls, self._calls = self._calls, []
        looked_at, self._looked_at = self._looked_at, set()
        calls += self._unasked([*self.inbox.keys, *looked_at], {item.key for call in calls for item in call.items})
        blocks = self._taken({item.key for call in calls for item in call.items})
        self._metrics.received(sum(block.count for block in blocks))
        job = self.submit(lambda: self._job(blocks, [item for call in calls for item in call.items]))
        job.add_done_callback(lambda done: self._finished(done, calls, blocks))

    def _pressing(self) -> bool:
        """Whether a job is worth its time."""
        inbox = self.inbox
        if self._calls or inbox.pressing or len(inbox) >= GATHERED:
            return True
        return self._standing.concerns(inbox.keys) or self._standing.behind(self._looked_at, inbox)

    def _taken(self, drafted: set[SequenceKey]) -> list[FeatureBlock]:
        """Of those who are drafted for now or whenever features come, and a piece where too much has gathered."""
        ordered = {key for key in self.inbox.keys if self._standing.concerns((key,))}
        return self.inbox.take(drafted | ordered, PIECE if len(self.inbox) >= GATHERED else 0)

    def _unasked(self, keys: Iterable[SequenceKey], asked: Container[SequenceKey]) -> Iterator[_Call]:
        """Calls that nobody made, of those who stay and whose features came."""
        due = self._standing.due((key for key in keys if key not in asked), self.inbox)
        for deliver, items in due.items():
            call = _Call(items, asyncio.get_running_loop().create_future())
            call.result.add_done_callback(partial(_deliver, deliver))
            yield call

    def _job(self, blocks: Sequence[FeatureBlock], items: Sequence[ProposeItem]) -> _Done:
        started_at = time.perf_counter()
        pulls = self._engine.append_features(blocks)
        result, learn = self._engine.compute(items) if items else (None, _nothing)
        return _Done(pulls, result, learn, started_at)

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
            self._lost(key)
        if done.result is None:
            return
        asyncio.get_running_loop().call_later(TELLING, self._learn, done.learn)
        proposals = iter(done.result.proposals)
        for call in calls:
            own = tuple(next(proposals) for _ in call.items)
            queued = max(0.0, done.started_at - call.ready_at)
            others = len(done.result.proposals) - len(own)
            _resolve(call.result, replace(done.result, proposals=own, queue_seconds=queued, other_requests=others))
        self._metrics.drafted(done.result)

    def _learn(self, learn: Callable[[], None]) -> None:
        """Once blocks have been told: until then it would be in the way, as all of it is Python."""
        if not self.closed:
            self.submit(learn)

    def _failed(self, failure: BaseException, calls: Sequence[_Call], blocks: Sequence[FeatureBlock]) -> None:
        """A bug or a device error: these calls fail, and what was to be appended is fetched again."""
        _log.error("engine job failed", exc_info=failure)
        for call in calls:
            if not call.result.done():
                call.result.set_exception(InternalError(f"drafting failed: {type(failure).__name__}: {failure}"))
        for key in {block.key for block in blocks}:
            self._lost(key)

    def _lost(self, key: SequenceKey) -> None:
        length = self._engine.length(key)
        if length is not None:
            self._incomplete(key, length)


def _nothing() -> None:
    """What is to be learned where nothing was drafted."""


def _resolve(future: asyncio.Future[ResultT], result: ResultT) -> None:
    if not future.done():  # the call was cancelled: its router is gone
        future.set_result(result)


def _deliver(deliver: Deliver, done: asyncio.Future[ProposeResult]) -> None:
    """What was drafted unasked; a fault in it has been logged, and whoever misses the block will ask."""
    if done.cancelled() or done.exception() is not None:
        return
    served = tuple(replace(p, stays=True) for p in done.result().proposals if p.error is None)
    if served:
        deliver(replace(done.result(), proposals=served))
