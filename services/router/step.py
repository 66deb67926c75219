"""One round: propose, plan, verify, commit. Reads like the design's picture; everything else is other modules' work."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import structlog

from dspark.errors import DSparkError, InternalError
from dspark.messages import PositionLogprobs, StepResult, Verdict
from services.router.batch import Entry, assemble, judged_rows, rows
from services.router.cohort import Cohort
from services.router.finish import FinishReason, cut
from services.router.metrics import Metrics
from services.router.proposing import Drafts, Proposing
from services.router.round import Round, Took
from services.router.scheduler import Scheduler
from services.router.sequences import Sequence
from services.router.tasks import later
from services.router.trace import Trace

__all__ = ["Owner", "Published", "Rounds"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Published:
    """New tokens of one sequence, on their way to its client."""

    sequence: Sequence
    tokens: list[int]
    logprobs: tuple[PositionLogprobs, ...]
    reason: FinishReason | None


class Owner(Protocol):
    """What rounds tell whoever owns the sequences."""

    def publish(self, news: list[Published]) -> None:
        """Hand tokens to their clients."""

    def retire(self, sequence: Sequence) -> None:
        """The sequence needs its workers no more."""

    def reopen(self, sequence: Sequence, error: DSparkError) -> None:
        """The verify worker does not go on with this sequence."""


class Rounds:
    """Steps cohorts. A verify worker that has not answered after `step_seconds` is given up."""

    def __init__(
        self, proposing: Proposing, owner: Owner, metrics: Metrics, trace: Trace, *, step_seconds: float
    ) -> None:
        self._proposing = proposing
        self._owner = owner
        self._metrics = metrics
        self._trace = trace
        self._step_seconds = step_seconds

    async def step(self, cohort: Cohort, scheduler: Scheduler) -> None:
        """One batch to one verify worker. Raises `DSparkError` where the worker cannot be relied on any more."""
        phase, began = self._metrics.phase, time.perf_counter()
        with phase("schedule"):
            round_ = scheduler.begin(cohort)  # whom to draft for: from earlier rounds only
        with phase("propose"):
            drafts = await self._proposing.propose(round_.asks, round_.running)
        with phase("schedule"):
            scheduler.plan(round_, drafts.proposals)
            batch = assemble(cohort, round_, drafts.proposals)
        if not batch:
            return
        sent = time.perf_counter()
        with phase("verify"):
            items = [entry.item for entry in batch]
            result = await cohort.link.step(items, self._step_seconds)
        seconds = time.perf_counter() - sent
        with phase("commit"):
            took = self._commit(cohort, round_, batch, result, began)
        round_.begins = drafts.begins
        later(self._learn, cohort, scheduler, round_, Done(batch, drafts, result, seconds, took))

    def _commit(self, cohort: Cohort, round_: Round, batch: list[Entry], result: StepResult, began: float) -> Took:
        """Takes in the verdicts. Text is made, and lessons are learned, while the next round waits for its workers."""
        _check(batch, result)
        news: list[Published] = []
        counts: list[tuple[int, int]] = []
        matched, verified, turned = np.full(len(round_.running), -1), *np.zeros((2, len(round_.running)), np.int64)
        for entry, verdict in zip(batch, result.verdicts, strict=True):
            sequence = entry.sequence
            if sequence.cohort is not cohort or sequence.key != verdict.key:
                continue  # cancelled or moved meanwhile
            if verdict.error is not None:
                self._owner.reopen(sequence, verdict.error)
            elif verdict.token is None:
                sequence.computed_len = verdict.computed_len
            else:
                news.append(self._accept(entry, verdict))
                if entry.row is not None:
                    matched[entry.row], turned[entry.row] = verdict.matched, verdict.turned
                    verified[entry.row] = verdict.alternatives
                    drafts = len(entry.item.draft_tokens) + verdict.alternatives
                    counts.append((drafts, verdict.accepted + verdict.turned))
        later(self._owner.publish, news)  # before anything that may fail: what is committed must reach its client
        self._count(cohort, result, news, counts)
        gained = sum(accepted + 1 for _, accepted in counts)
        apart = result.queue_seconds if not result.other_tokens else 0.0  # behind a step of others, whose tokens it had
        seconds = time.perf_counter() - began - apart
        return Took(
            matched,
            gained,
            seconds,
            other_rows=result.other_tokens,
            other_prompt_rows=result.other_prompt_tokens,
            company=result.other_sequences,
            other_gained=result.other_gained,
            alternatives=verified,
            turned=turned > 0,
        )

    def _accept(self, entry: Entry, verdict: Verdict) -> Published:
        """Commits accepted drafts and what comes after them, as far as the request goes."""
        sequence = entry.sequence
        if entry.row is not None:
            sequence.counts.add_round(
                drafted=entry.drafted,
                verified=len(entry.item.draft_tokens),
                accepted=verdict.accepted,
                missed=entry.missed,
                matched=verdict.matched,
                alternatives=verdict.alternatives,
                turned=verdict.turned,
            )
        tokens = list(entry.item.committed(verdict))
        kept, reason = cut(tokens, sequence.left, sequence.request)
        sequence.commit(tokens[:kept], verdict.computed_len)
        if reason is not None:
            self._owner.retire(sequence)
        return Published(sequence, tokens[:kept], verdict.logprobs[:kept], reason)

    def _count(self, cohort: Cohort, result: StepResult, news: list[Published], rounds: list[tuple[int, int]]) -> None:
        tokens = sum(len(published.tokens) for published in news)
        cohort.link.rounds += 1
        cohort.link.tokens += tokens
        drafted = [(verified, accepted) for verified, accepted in rounds if verified]
        self._metrics.verified(result)
        self._metrics.generation_tokens.inc(tokens)
        self._metrics.committed(len(rounds), [v for v, _ in drafted], [a for _, a in drafted])

    def _learn(self, cohort: Cohort, scheduler: Scheduler, round_: Round, done: Done) -> None:
        """What the round came to beside what was expected of it. Nobody waits for it, so a fault is logged."""
        with self._metrics.phase("learn"):
            try:
                self._compare(cohort, scheduler, round_, done)
            except Exception:  # noqa: BLE001 - streams go on without the lesson
                _log.exception("nothing was learned from a round", worker=cohort.link.worker_id)

    def _compare(self, cohort: Cohort, scheduler: Scheduler, round_: Round, done: Done) -> None:
        size, context = rows(done.batch), round_.context
        judged = judged_rows(done.batch)
        expected = scheduler.costs.step(judged + scheduler.costs.price(size - judged), context)
        if not round_.catches_up:
            scheduler.costs.drafted(done.drafts, round_.unhidden)
        scheduler.costs.verified(size, judged, context, done.seconds, done.result)
        took = replace(
            done.took,
            step_seconds=done.result.total_seconds,
            expected_seconds=expected,
            draft_seconds=done.drafts.seconds,
        )
        scheduler.learn(round_, took)
        self._metrics.expected(expected, done.result.total_seconds)
        if self._trace.on:
            self._trace.write(
                worker=cohort.link.worker_id,
                load_age=round(cohort.link.load_age, 3),
                advantage=round(scheduler.payoff.advantage, 4),
                expected_step_seconds=round(expected, 6),
                **_figures(round_, done),
            )


@dataclass(frozen=True, slots=True)
class Done:
    """A round behind us: its batch, what the workers said, and `seconds` from the step's request to its verdicts."""

    batch: list[Entry]
    drafts: Drafts
    result: StepResult
    seconds: float
    took: Took


def _figures(round_: Round, done: Done) -> dict[str, Any]:
    """For the trace."""
    decision = round_.decision
    return {
        "running": len(round_.running),
        "prompt_rows": sum(round_.pieces),
        "other_rows": done.result.other_tokens,
        "drafted": int(round_.proposed.sum()),
        "verified": round_.drafts,
        "limit": decision.limit if decision is not None else None,
        "probe": decision is not None and decision.probe,
        "context": round(round_.context, 1),
        "tokens": done.took.tokens,
        "turned": int(np.count_nonzero(done.took.turned)),
        "expected_tokens": round(round_.tokens, 4),
        "step_seconds": round(done.result.total_seconds, 6),
        "verify_seconds": round(done.seconds, 6),
        "draft_seconds": round(done.drafts.seconds, 6),
        "expected_draft_seconds": round(round_.unhidden, 6),
    }


def _check(batch: list[Entry], result: StepResult) -> None:
    """Before anything is committed: a verdict that cannot be true means the worker is broken."""
    for entry, verdict in zip(batch, result.verdicts, strict=True):
        verified, vocab = len(entry.item.draft_tokens), entry.sequence.model.info.vocab_size
        kept = verified if entry.item.keep is None else min(verified, entry.item.keep)
        if verdict.accepted > kept or (verdict.token is not None and verdict.token >= vocab):
            raise InternalError(f"verdict: {verdict.accepted} accepted of {kept}, token {verdict.token} of {vocab}")
        if not verdict.accepted <= verdict.matched <= verified:
            raise InternalError(f"verdict: {verdict.matched} drafts match of {verified}, {verdict.accepted} accepted")
        if verdict.alternatives > len(entry.item.alternatives):
            raise InternalError(f"verdict: {verdict.alternatives} of {len(entry.item.alternatives)} alternatives")
        if verdict.turned and verdict.accepted + 1 not in {one.place for one in entry.item.alternatives}:
            raise InternalError(f"verdict: an alternative to draft {verdict.accepted + 1}, where there was none")
