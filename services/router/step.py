"""One round: propose, plan, verify, commit. Reads like the design's picture; everything else is other modules' work."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from dspark.errors import DSparkError, InternalError
from dspark.messages import PositionLogprobs, Proposal, StepItem, StepResult, Verdict
from services.router.cohort import Cohort
from services.router.drafting import Drafting
from services.router.finish import FinishReason, cut
from services.router.metrics import Metrics
from services.router.plan import Room, level, plan, wanted
from services.router.sequences import Sequence

__all__ = ["Entry", "Limits", "Owner", "Published", "Rounds", "assemble"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step.

    Attributes:
        verify_length: draft tokens verified a round and sequence.
        prefill_tokens: prompt positions in a step beside running sequences, so that these wait little.
        step_seconds: after which a verify worker that has not answered is given up.
    """

    verify_length: int
    prefill_tokens: int
    step_seconds: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence's part in a batch."""

    sequence: Sequence
    item: StepItem
    round: bool  # not a piece of its prompt
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
    """Steps cohorts."""

    def __init__(self, drafting: Drafting, limits: Limits, owner: Owner, metrics: Metrics) -> None:
        self._drafting = drafting
        self._limits = limits
        self._owner = owner
        self._metrics = metrics

    async def step(self, cohort: Cohort) -> None:
        """One batch to one verify worker. Raises `DSparkError` where the worker cannot be relied on any more."""
        phase = self._metrics.phase
        with phase("propose"):
            proposals = await self._drafting.propose(cohort.running(), self._limits.verify_length)
        with phase("schedule"):
            batch = assemble(cohort, proposals, self._limits)
        if not batch:
            return
        with phase("verify"):
            result = await cohort.link.step([entry.item for entry in batch], self._limits.step_seconds)
        with phase("commit"):
            self._commit(cohort, batch, result)

    def _commit(self, cohort: Cohort, batch: list[Entry], result: StepResult) -> None:
        """Takes in the verdicts. Text is made while the next round waits for its workers."""
        _check(batch, result)
        news: list[Published] = []
        rounds: list[tuple[int, int]] = []
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
                if entry.round:
                    rounds.append((len(entry.item.draft_tokens), verdict.accepted))
        self._count(cohort, result, news, rounds)
        self._publish_later(news)

    def _publish_later(self, news: list[Published]) -> None:
        """Two turns of the loop from now: by then the next round's request has left."""
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._owner.publish, news)

    def _accept(self, entry: Entry, verdict: Verdict, token: int) -> Published:
        """Commits accepted drafts and the token after them, as far as the request goes."""
        sequence, verified = entry.sequence, len(entry.item.draft_tokens)
        if entry.round:
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


def _check(batch: list[Entry], result: StepResult) -> None:
    """Before anything is committed: a verdict that cannot be true means the worker is broken."""
    for entry, verdict in zip(batch, result.verdicts, strict=True):
        verified, vocab = len(entry.item.draft_tokens), entry.sequence.model.info.vocab_size
        if verdict.accepted > verified or (verdict.token is not None and verdict.token >= vocab):
            raise InternalError(f"verdict: {verdict.accepted} accepted of {verified}, token {verdict.token} of {vocab}")


def assemble(cohort: Cohort, proposals: Mapping[str, Proposal], limits: Limits) -> list[Entry]:
    """The batch: every running sequence's anchor and draft prefix, and pieces of prompts in the rows that are left."""
    running, prompts = cohort.running(), cohort.prompts()
    rows = cohort.link.max_step_tokens - len(running)
    pieces = level([p.uncomputed for p in prompts], min(rows, limits.prefill_tokens) if running else rows)
    blocks = [_block(s, proposals.get(s.sequence_id)) for s in running]
    rooms = [
        Room(len(block.tokens) if block else 0, s.left, s.request.max_verify_length)
        for s, block in zip(running, blocks, strict=True)
    ]
    lengths = plan(rooms, verify_length=limits.verify_length, budget=rows - sum(pieces))
    rounds = [_round(s, b, n, limits) for s, b, n in zip(running, blocks, lengths, strict=True)]
    return rounds + [_piece(p, count) for p, count in zip(prompts, pieces, strict=True) if count]


def _block(sequence: Sequence, proposal: Proposal | None) -> Proposal | None:
    """The proposal, if it is for where the sequence is now."""
    fresh = proposal is not None and (proposal.key, proposal.committed_len) == (sequence.key, sequence.committed_len)
    return proposal if fresh else None


def _round(sequence: Sequence, block: Proposal | None, length: int, limits: Limits) -> Entry:
    want = wanted(sequence.left, sequence.request.max_verify_length, limits.verify_length)
    item = StepItem(
        sequence.key,
        sequence.committed_len,
        sequence.uncomputed,
        block.tokens[:length] if block else (),
        block.distributions[:length] if block else (),
    )
    missed = block is None and want > 0 and sequence.request.speculation
    return Entry(sequence, item, round=True, drafted=len(block.tokens) if block else 0, missed=missed)


def _piece(sequence: Sequence, count: int) -> Entry:
    return Entry(sequence, StepItem(sequence.key, sequence.committed_len, count), round=False)
