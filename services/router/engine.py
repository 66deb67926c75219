"""Owns every sequence from submission to its end: brings queue, cohorts, drafting and rounds together.

Runs in one event loop and never awaits a client, the store or an attachment; only workers' rounds.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import structlog

from dspark.errors import (
    ConfigError,
    DeadlineExceeded,
    DSparkError,
    InternalError,
    OutOfPages,
    Unavailable,
)
from services.router import placement
from services.router.active import Active
from services.router.catalog import Catalog
from services.router.chronicle import Chronicle
from services.router.cohort import Cohort
from services.router.connecting import connect_draft, connect_verifier
from services.router.costs import RoundCosts
from services.router.dispatch import Dispatcher
from services.router.drafting import Drafting
from services.router.finish import FinishReason
from services.router.links import DraftLink, VerifierLink
from services.router.memory import Memory
from services.router.metrics import Metrics
from services.router.options import Options
from services.router.pools import Pool, Workers
from services.router.proposing import Proposing
from services.router.requests import ServedModel
from services.router.scheduler import Scheduler
from services.router.scheduling.policies import Policy
from services.router.sequences import Sequence
from services.router.step import Published, Rounds
from services.router.tasks import Tasks, guarded
from services.router.trace import Trace

__all__ = ["PROFILE_HINT", "Engine"]

_log = structlog.get_logger(__name__)
HOUSEKEEPING_SECONDS = 0.25
PROFILE_HINT = (
    "the adaptive policies need one; make it with `dspark profile` or by starting workers with --profile auto, "
    "or choose --policy fixed:5"
)


class Engine:
    """The router without its front, for `async with`."""

    def __init__(self, workers: Workers, options: Options, metrics: Metrics) -> None:
        self.options = options
        self._workers = workers
        self.metrics = metrics
        self.catalog = Catalog()
        self.verifiers = Pool(
            "verify",
            workers,
            connect_verifier,
            prepare=self._prepare_verifier,
            joined=self._verifier_joined,
            left=self._verifier_left,
        )
        self.drafters = Pool(
            "draft", workers, connect_draft, prepare=_ready, joined=self._draft_joined, left=self._draft_left
        )
        self.drafting = Drafting(self.drafters.links)
        self._proposing = Proposing(self.drafting, patience=options.patience, metrics=metrics)
        self.dispatcher = Dispatcher(
            self.verifiers.links,
            max_running=options.max_running,
            worker_wait=options.worker_wait,
            features=self._wants_drafts,
            opened=self._opened,
            failed=self.cancel,
        )
        self._trace = Trace(options.trace)
        self._rounds = Rounds(self._proposing, self, metrics, self._trace, step_seconds=options.step_seconds)
        self._memory = Memory(options.verify_length)
        self.active = Active()
        self._chronicle = Chronicle(metrics)
        self._cohorts: dict[VerifierLink, Cohort] = {}
        self._schedulers: dict[VerifierLink, Scheduler] = {}
        self._serving: dict[VerifierLink, asyncio.Task[None]] = {}
        self._served = False  # whether a verify worker ever joined
        self._blind: asyncio.Future[ConfigError] = asyncio.get_running_loop().create_future()
        self._tasks = Tasks()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.enter_context(self._trace)
            await stack.enter_async_context(self._tasks)
            await stack.enter_async_context(self._proposing)
            await stack.enter_async_context(self.verifiers)
            await stack.enter_async_context(self.drafters)
            for work in (self.dispatcher.run(), self.drafting.run(), self._keep_house()):
                self._tasks.start(work)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sequence in self.active:
            self.cancel(sequence, Unavailable("the router is shutting down"))
        await asyncio.sleep(0.05)  # let the workers hear of it
        await self._stack.__aexit__(kind, error, trace)

    # ------------------------------------------------------------ for the front

    @property
    def running(self) -> int:
        """Sequences open at a verify worker."""
        return sum(len(link.sequences) for link in self.verifiers.links.values())

    def submit(self, sequence: Sequence) -> None:
        """Queues it; events come through its outlet. `InvalidRequest` for the id of an active request."""
        self.active.add(sequence)
        self._chronicle.accepted(sequence)
        self.dispatcher.put(sequence)

    def abort(self, request_id: str, error: DSparkError) -> bool:
        """Ends a request by its id; whether there was one."""
        sequence = self.active.get(request_id)
        if sequence is not None:
            self.cancel(sequence, error)
        return sequence is not None

    def cancel(self, sequence: Sequence, error: DSparkError) -> None:
        """Ends a request before it is complete: frees it everywhere and tells its client why."""
        if not sequence.ended:
            self.retire(sequence)
        if self.active.forget(sequence):
            self._chronicle.ended_early(sequence, error)
        sequence.give_up(error)

    def capacity(self, model: ServedModel) -> int | None:
        """Tokens of the longest sequence that a connected worker can hold; None while none is connected."""
        fingerprint = model.info.model_fingerprint
        links = [link for link in self.verifiers.links.values() if link.model.model_fingerprint == fingerprint]
        return max((link.capacity for link in links), default=None)

    def knows_costs(self, model: ServedModel) -> bool:
        """Whether the model's connected verify workers have all shown what their steps cost."""
        fingerprint = model.info.model_fingerprint
        links = [link for link in self.verifiers.links.values() if link.model.model_fingerprint == fingerprint]
        return bool(links) and all(link.costs is not None for link in links)

    # ------------------------------------------------------------ workers come and go

    async def _prepare_verifier(self, link: VerifierLink) -> None:
        if self.options.policy.needs_costs and link.costs is None:
            error = ConfigError(f"{link.worker_id} has no cost profile: {PROFILE_HINT}")
            if self._nobody_has_costs() and not self._blind.done():
                self._blind.set_result(error)
            raise error
        await self.catalog.learn(link)

    async def until_blind(self) -> ConfigError:
        """Returns why, once a verify worker was refused for its lack of costs while no other has any or had."""
        return await asyncio.shield(self._blind)

    def _nobody_has_costs(self) -> bool:
        records = [reading.record for reading in self._workers.readings()]
        return not self._served and not any(r.role == "verify" and r.profile_fingerprint for r in records)

    def _verifier_joined(self, link: VerifierLink) -> None:
        self._served = True
        cohort = self._cohorts[link] = Cohort(link)
        self._schedulers[link] = Scheduler(
            RoundCosts(link),
            self._memory,
            self.drafters.links,
            self._proposing.able,
            self.options,
            attach=self.drafting.wake,
        )
        link.on_load = self.dispatcher.wake
        self._serving[link] = self._tasks.start(self._serve(cohort))
        self.dispatcher.wake()

    def _verifier_left(self, link: VerifierLink, reason: str) -> None:
        cohort = self._cohorts.pop(link)
        del self._schedulers[link]
        self._serving.pop(link).cancel()
        for sequence in cohort.sequences:
            self.reopen(sequence, Unavailable(f"{link.worker_id}: {reason}"))

    def _draft_joined(self, link: DraftLink) -> None:
        link.on_load = self.drafting.wake
        link.on_unasked = self.metrics.unasked_came
        self.drafting.wake()

    def _draft_left(self, link: DraftLink, _reason: str) -> None:
        self.drafting.worker_left(link)

    async def _serve(self, cohort: Cohort) -> None:
        """Steps a cohort until its worker fails; `_verifier_left` then takes its sequences."""
        link, scheduler = cohort.link, self._schedulers[cohort.link]
        while link.alive:
            await cohort.wait_ready()
            began = time.perf_counter()
            try:
                self._evacuate(cohort)
                await self._rounds.step(cohort, scheduler)
            except DSparkError as error:
                link.fail(str(error))
            except Exception:  # noqa: BLE001 - a fault of ours must not end every stream: they go on elsewhere
                _log.exception("a round failed", worker=link.worker_id)
                link.fail("the router failed in a round")
            self.metrics.runnable_seconds.inc(time.perf_counter() - began)

    def _evacuate(self, cohort: Cohort) -> None:
        """Moves what fits elsewhere off a worker that is about to leave."""
        if not cohort.link.load.draining or self.dispatcher.moving:
            return
        others = self.verifiers.links.values()
        for sequence in placement.evacuees(cohort.link, others, max_running=self.options.max_running):
            self._move(sequence, "drain")

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            guarded(self._show)
            guarded(self._look_after)

    def _show(self) -> None:
        self.metrics.running.set(self.running)
        self.metrics.waiting.set(len(self.active) - self.running)
        self.metrics.connected(draft=len(self.drafters.links), verify=len(self.verifiers.links))
        self.metrics.store_age.set(self._workers.age)
        for (mode, drafter), number in self._memory.tracker.settings.items():
            self.metrics.tracked(mode, drafter, self._memory.tracker.report(number))

    def _look_after(self) -> None:
        """Clients that stopped reading, and workers about to leave whose rounds rest."""
        for sequence in self.active:
            if sequence.outlet.full_seconds > self.options.stall_seconds:
                reason = f"the client has read nothing for {self.options.stall_seconds:g} s"
                self.cancel(sequence, DeadlineExceeded(reason))
        for cohort in self._cohorts.values():
            if not cohort.running() and not cohort.prompts():  # its rounds would not move anything
                self._evacuate(cohort)

    # ------------------------------------------------------------ what happens to sequences

    def _opened(self, sequence: Sequence, link: VerifierLink) -> None:
        self._cohorts[link].join(sequence)
        if self._wants_drafts(sequence):
            sequence.dormant = self._policy(sequence).needs_costs and self._schedulers[link].quiet(link.own)
            self.drafting.enlist(sequence)

    def _wants_drafts(self, sequence: Sequence) -> bool:
        return sequence.request.speculation and self._policy(sequence).ask(self.options.verify_length) > 0

    def _policy(self, sequence: Sequence) -> Policy:
        return sequence.request.policy or self.options.policy

    def publish(self, news: list[Published]) -> None:
        """Hands tokens to their clients, and ends requests that are complete."""
        with self.metrics.phase("publish"):
            for published in news:
                try:
                    self._publish(published)
                except Exception:  # noqa: BLE001 - the others' tokens must not be lost with it
                    _log.exception("tokens not published", request_id=published.sequence.request.request_id)
                    self.cancel(published.sequence, InternalError("the router failed to hand on its tokens"))

    def _publish(self, published: Published) -> None:
        sequence = published.sequence
        first = sequence.first_token_seconds == 0.0
        reason = sequence.publish(published.tokens, published.logprobs, published.reason)
        if first:
            self._chronicle.first_token(sequence)
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if not sequence.ended:  # ended by a stop string, which only its text shows
            self.retire(sequence)
        if self.active.forget(sequence):
            end = sequence.finished(reason)
            self.metrics.finished(end)
            self._chronicle.finished(sequence, reason)
            sequence.outlet.end(end)

    def retire(self, sequence: Sequence) -> None:
        """Frees it at its workers and in the queue."""
        sequence.ended = True
        self.dispatcher.remove(sequence)
        self._leave(sequence)

    def reopen(self, sequence: Sequence, error: DSparkError) -> None:
        """Its worker does not go on with it: somewhere else, or there again, with everything committed so far."""
        if not isinstance(error, OutOfPages):
            sequence.failures += 1
        self._chronicle.reopening(sequence, error)
        if sequence.hopeless:
            reason = f"the sequence failed {sequence.failures} times without a new token, the last time: {error}"
            self.cancel(sequence, InternalError(reason))
        else:
            self._move(sequence, type(error).__name__)

    def _move(self, sequence: Sequence, cause: str) -> None:
        self.metrics.reopened.labels(cause).inc()
        self._leave(sequence)
        self.dispatcher.put(sequence, moved=True)

    def _leave(self, sequence: Sequence) -> None:
        """Off its workers, under the present epoch."""
        self.drafting.dismiss(sequence)
        self._memory.leave(sequence)
        if sequence.cohort is not None:
            sequence.cohort.link.release(sequence.key)
            sequence.cohort.leave(sequence)
            self.dispatcher.wake()


async def _ready(_link: DraftLink) -> None:
    """A draft worker needs no preparation."""
