"""One round: propose, plan, verify, commit. Reads like the design's picture; everything else is other modules' work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dspark.errors import DSparkError, InternalError
from dspark.messages import PositionLogprobs, Proposal, SequenceKey, StepItem, StepResult, Verdict
from services.router.cohort import Cohort
from services.router.drafting import Drafting, Drafts
from services.router.finish import FinishReason, cut
from services.router.metrics import Metrics
from services.router.scheduler import Round, Scheduler, Took
from services.router.sequences import Sequence
from services.router.trace import Trace

__all__ = ["Entry", "Owner", "Published", "Rounds", "assemble"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence's part in a batch."""

    sequence: Sequence
    item: StepItem
    row: int | None = None  # in the round; None: a piece of its prompt
    drafted: int = 0
    missed: bool = False


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
        self, drafting: Drafting, owner: Owner, metrics: Metrics, trace: Trace, *, step_seconds: float
    ) -> None:
        self._drafting = drafting
        self._owner = owner
        self._metrics = metrics
        self._trace = trace
        self._step_seconds = step_seconds

    async def step(self, cohort: Cohort, scheduler: Scheduler) -> None:
        """One batch to one verify worker. Raises `DSparkError` where the worker cannot be relied on any more."""
        phase = self._metrics.phase
        with phase("schedule"):
            round_ = scheduler.begin(cohort)  # whom to draft for: from earlier rounds only
        with phase("propose"):
            drafts = await self._drafting.propose(round_.asks)
        with phase("schedule"):
            scheduler.plan(round_, drafts.proposals)
            batch = assemble(cohort, round_, drafts.proposals)
        if not batch:
            return
        began = time.perf_counter()
        with phase("verify"):
            result = await cohort.link.step([entry.item for entry in batch], self._step_seconds)
        seconds = time.perf_counter() - began
        with phase("commit"):
            took = self._commit(cohort, round_, batch, result, seconds + drafts.seconds)
            self._learn(cohort, scheduler, round_, batch, took, drafts, result, seconds)

    def _commit(self, cohort: Cohort, round_: Round, batch: list[Entry], result: StepResult, seconds: float) -> Took:
        """Takes in the verdicts. Text is made while the next round waits for its workers."""
        _check(batch, result)
        news: list[Published] = []
        counts: list[tuple[int, int]] = []
        matched = np.full(len(round_.running), -1)
        for entry, verdict in zip(batch, result.verdicts, strict=True):
            sequence = entry.sequence
            if sequence.cohort is not cohort or sequence.key != verdict.key:
                continue  # cancelled or moved meanwhile
            if verdict.error is not None:
                self._owner.reopen(sequence, verdict.error)
            elif verdict.token is None:
                sequence.computed_len = verdict.computed_len
            else:
                news.append(self._accept(entry, verdict, verdict.token))
                if entry.row is not None:
                    matched[entry.row] = verdict.matched
                    counts.append((len(entry.item.draft_tokens), verdict.accepted))
        self._count(cohort, result, news, counts)
        self._publish_later(news)
        gained = sum(accepted + 1 for _, accepted in counts)
        return Took(matched, gained, seconds)

    def _publish_later(self, news: list[Published]) -> None:
        """Two turns of the loop from now: by then the next round's request has left."""
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._owner.publish, news)

    def _accept(self, entry: Entry, verdict: Verdict, token: int) -> Published:
        """Commits accepted drafts and the token after them, as far as the request goes."""
        sequence, verified = entry.sequence, len(entry.item.draft_tokens)
        if entry.row is not None:
            sequence.counts.add_round(
                drafted=entry.drafted, verified=verified, accepted=verdict.accepted, missed=entry.missed
            )
        tokens = [*entry.item.draft_tokens[: verdict.accepted], token]
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

    def _learn(
        self,
        cohort: Cohort,
        scheduler: Scheduler,
        round_: Round,
        batch: list[Entry],
        took: Took,
        drafts: Drafts,
        result: StepResult,
        seconds: float,
    ) -> None:
        """What the round came to beside what was expected of it."""
        judged = sum(1 + len(entry.item.draft_tokens) for entry in batch if entry.row is not None)
        rows = sum(entry.item.count + len(entry.item.draft_tokens) for entry in batch)
        expected = scheduler.costs.step(rows, round_.context)
        scheduler.costs.drafted(drafts)
        scheduler.costs.verified(rows, judged, round_.context, seconds, result)
        scheduler.learn(round_, took)
        self._metrics.expected(expected, result.total_seconds)
        if self._trace.on:
            self._trace.write(
                worker=cohort.link.worker_id,
                running=len(round_.running),
                prompt_rows=sum(round_.pieces),
                other_rows=result.other_tokens,
                drafted=int(round_.proposed.sum()),
                verified=round_.drafts,
                limit=round_.decision.limit if round_.decision is not None else None,
                probe=bool(round_.decision is not None and round_.decision.probe),
                context=round(round_.context, 1),
                tokens=took.tokens,
                expected_tokens=round(round_.tokens, 4),
                step_seconds=round(result.total_seconds, 6),
                expected_step_seconds=round(expected, 6),
                verify_seconds=round(seconds, 6),
                draft_seconds=round(drafts.seconds, 6),
                expected_draft_seconds=round(round_.unhidden, 6),
                load_age=round(cohort.link.load_age, 3),
                advantage=round(scheduler.payoff.advantage, 4),
            )


def _check(batch: list[Entry], result: StepResult) -> None:
    """Before anything is committed: a verdict that cannot be true means the worker is broken."""
    for entry, verdict in zip(batch, result.verdicts, strict=True):
        verified, vocab = len(entry.item.draft_tokens), entry.sequence.model.info.vocab_size
        kept = verified if entry.item.keep is None else min(verified, entry.item.keep)
        if verdict.accepted > kept or (verdict.token is not None and verdict.token >= vocab):
            raise InternalError(f"verdict: {verdict.accepted} accepted of {kept}, token {verdict.token} of {vocab}")
        if not verdict.accepted <= verdict.matched <= verified:
            raise InternalError(f"verdict: {verdict.matched} drafts match of {verified}, {verdict.accepted} accepted")


def assemble(cohort: Cohort, round_: Round, proposals: Mapping[str, Proposal]) -> list[Entry]:
    """The batch: every running sequence's anchor and draft prefix, and pieces of prompts in the rows that are left.

    Who was cancelled, has moved or rests since the round began is left out.
    """
    plans = zip(round_.running, round_.keys, round_.proposed, *round_.lengths, strict=True)
    rounds = [
        _round(row, sequence, proposals.get(sequence.sequence_id) if proposed else None, length, keep, missed=missed)
        for row, (sequence, key, proposed, length, keep, missed) in enumerate(plans)
        if _stays(sequence, key, cohort) and not sequence.outlet.full
    ]
    pieces = zip(round_.prompts, round_.prompt_keys, round_.pieces, strict=True)
    return rounds + [_piece(prompt, count) for prompt, key, count in pieces if count and _stays(prompt, key, cohort)]


def _stays(sequence: Sequence, key: SequenceKey, cohort: Cohort) -> bool:
    return sequence.cohort is cohort and sequence.key == key


def _round(row: int, sequence: Sequence, block: Proposal | None, length: int, keep: int, *, missed: int) -> Entry:
    item = StepItem(
        sequence.key,
        sequence.committed_len,
        sequence.uncomputed,
        block.tokens[:length] if block else (),
        block.distributions[:length] if block else (),
        keep if keep < length else None,
    )
    return Entry(sequence, item, row, drafted=len(block.tokens) if block else 0, missed=bool(missed))


def _piece(sequence: Sequence, count: int) -> Entry:
    return Entry(sequence, StepItem(sequence.key, sequence.committed_len, count))
