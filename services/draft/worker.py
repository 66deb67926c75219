"""A draft worker without its wire: sequences come and go, features flow in, blocks are drafted (`jobs.py`).

Knows who is attached, and what a block that is asked for has to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import structlog

from dspark.errors import DSparkError, FeaturesMissing, StaleMessage, Unavailable, UnknownSequence
from dspark.messages import (
    Attached,
    AttachSequence,
    Proposal,
    ProposeItem,
    ProposeResult,
    SequenceKey,
    WorkerLoad,
)
from services.draft.engine import DraftEngine
from services.draft.intake import FeatureIntake
from services.draft.jobs import EngineJobs
from services.draft.link import Connect
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer
from services.draft.standing import Deliver, StandingOrders
from services.draft.wire import WireLink

__all__ = ["DraftWorker"]

_LONGEST_WAIT = 10.0  # seconds; a router that asks for more is told what came by then

_log = structlog.get_logger(__name__)


class DraftWorker:
    """For `async with`. All methods run on the event loop; the engine computes in its own thread only."""

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
        connect: Connect = WireLink,
    ) -> None:
        """`present`, `connect_seconds`, `linger_seconds`, `connect`: as `FeatureIntake` takes them.

        `executor`: of one thread, the engine's.
        """
        self._engine = engine
        self._metrics = metrics
        self._standing = StandingOrders()
        executor = executor or ThreadPoolExecutor(1, "draft-engine")
        self._jobs = EngineJobs(engine, self._standing, executor, metrics, incomplete=self._incomplete)
        self._inbox = self._jobs.inbox
        self._intake = FeatureIntake(
            offer,
            self._inbox,
            present=present,
            connect_seconds=connect_seconds,
            linger_seconds=linger_seconds,
            connect=connect,
        )
        self._sequences: dict[str, AttachSequence] = {}
        self._empty = asyncio.Event()
        self.draining = False

    async def __aenter__(self) -> Self:
        await self._intake.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._intake.__aexit__(kind, error, trace)
        await self._jobs.close()

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
            self._engine.load(), running=len(self._sequences), waiting=self._jobs.waiting, draining=self.draining
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
            self._engine.attach(request)
            await asyncio.sleep(0)  # what came with it and replaces it goes first
            self._check_attached(request.key)
            await self._intake.subscribe(request.key, request.verifier_address)
            self._check_attached(request.key)
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
        self._standing.cancel(gone)
        self._engine.detach(gone)  # at once, as they are attached: what comes back the next moment is not to be lost
        self._note_empty()

    def _note_empty(self) -> None:
        if not self._sequences:
            self._empty.set()

    def _attached(self, key: SequenceKey) -> bool:
        request = self._sequences.get(key.sequence_id)
        return request is not None and request.key == key

    # ------------------------------------------------------------ drafting

    async def propose(
        self, items: Sequence[ProposeItem], wait_seconds: float, deliver: Deliver | None = None
    ) -> ProposeResult:
        """One block for each item, in order; an item that cannot be served carries its error.

        Waits up to `wait_seconds` for features up to position committed_len - 2, then drafts for those that have them.
        Of those who stay `deliver` gets further blocks until they are asked for anew; without it nobody does.
        """
        asked_at = time.perf_counter()
        self._standing.cancel(item.key for item in items if not (item.later and item.stay))
        self._stay([item for item in items if item.later], deliver)
        asked = [item for item in items if not item.later and self._attached(item.key)]
        needs = {item.key: item.committed_len - 1 for item in asked}
        await self._inbox.wait(needs, max(0.0, min(_LONGEST_WAIT, wait_seconds)))
        refused = {index: error for index, item in enumerate(items) if (error := self._refusal(item)) is not None}
        waited = time.perf_counter() - asked_at
        served = [item for index, item in enumerate(items) if index not in refused and not item.later]
        self._stay(served, deliver)
        result = await self._jobs.draft(served)
        self._standing.cancel(proposal.key for proposal in result.proposals if proposal.error is not None)
        proposals = _merge(items, refused, iter(result.proposals), stays=deliver is not None)
        answer = replace(result, proposals=proposals, feature_wait_seconds=waited)
        self._metrics.missed(sum(isinstance(proposal.error, FeaturesMissing) for proposal in proposals))
        self._metrics.answered(answer)
        return answer

    def _stay(self, items: Iterable[ProposeItem], deliver: Deliver | None) -> None:
        """With those of them who want it and are attached."""
        for item in items:
            if deliver is not None and item.stay and self._attached(item.key):
                self._standing.place(item, self._sequences[item.key.sequence_id].max_len, deliver)
                if item.later:  # its features may have come meanwhile
                    self._jobs.look_at(item.key)

    def _refusal(self, item: ProposeItem) -> DSparkError | None:
        """Why an item cannot be drafted for now, as far as the loop knows."""
        request = self._sequences.get(item.key.sequence_id)
        if request is None:
            return UnknownSequence(f"{_describe(item.key)} is not attached here")
        if request.key.epoch != item.key.epoch:
            return StaleMessage(f"{_describe(item.key)}: epoch {request.key.epoch} is attached here")
        length = self._inbox.length(item.key) or 0
        if length >= item.committed_len - 1 or item.later:
            return None
        self._intake.pull(item.key)
        return FeaturesMissing(
            f"{_describe(item.key)}: features of {length} positions are here, {item.committed_len - 1} are needed"
        )

    def _incomplete(self, key: SequenceKey, length: int) -> None:
        """Only so many positions are with the engine: what came after them was lost, and is fetched again."""
        self._inbox.rewind(key, length)
        self._intake.pull(key)


def _merge(
    items: Sequence[ProposeItem],
    refused: Mapping[int, DSparkError],
    drafted: Iterator[Proposal],
    *,
    stays: bool,
) -> tuple[Proposal, ...]:
    def answer(index: int, item: ProposeItem) -> Proposal:
        if index in refused:
            return Proposal(item.key, item.committed_len, error=refused[index])
        proposal = Proposal(item.key, item.committed_len) if item.later else next(drafted)
        return replace(proposal, stays=stays and item.stay and proposal.error is None)

    return tuple(answer(index, item) for index, item in enumerate(items))


def _describe(key: SequenceKey) -> str:
    return f"sequence {key.sequence_id!r} epoch {key.epoch}"


def _names(request: AttachSequence) -> dict[str, object]:
    return {"request_id": request.request_id, "sequence": request.key.sequence_id, "epoch": request.key.epoch}
