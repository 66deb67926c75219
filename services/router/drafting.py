"""Which draft worker each sequence has, and one round's proposals. A missing proposal costs only the drafts.

Attaching never holds a round up: a sequence without a drafter, or whose drafter is late, is verified plainly.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import structlog

from dspark.errors import DSparkError, Mismatch, StaleMessage, UnknownSequence
from dspark.messages import Attached, Mode, Proposal, ProposeItem, ProposeResult
from services.router import placement
from services.router.links import DraftLink
from services.router.metrics import Metrics
from services.router.options import Patience
from services.router.sequences import Sequence
from services.router.tasks import Tasks, guarded

__all__ = ["Ask", "Drafting", "Drafts"]

_log = structlog.get_logger(__name__)
BALANCE_SECONDS = 0.25
RETRY_SECONDS = 1.0  # after a refused attachment
MAX_SKIPPED = 8
MAX_MISSES = 6  # in a row, before the sequence is attached anew
ALIKE = 0.75  # of a batch's blocks, at least, are as long as the longest where its time tells what such blocks take

Ask: TypeAlias = tuple[Sequence, int]
"""A sequence and how many draft tokens are wanted for it."""

_Call: TypeAlias = tuple[Sequence, ProposeItem]


@dataclass(frozen=True, slots=True)
class Drafts:
    """One round's blocks.

    Attributes:
        proposals: by sequence id; sequences without one are missing.
        seconds: that the round waited for them.
        engine_seconds: of these, what the slowest draft worker's engine took; 0 where no block came.
    """

    proposals: Mapping[str, Proposal] = field(default_factory=dict)
    seconds: float = 0.0
    engine_seconds: float = 0.0


class Drafting:
    """Attachments of sequences to draft workers. `links` is a live view of the connected ones."""

    def __init__(self, links: Mapping[str, DraftLink], *, patience: Patience, metrics: Metrics) -> None:
        self._links = links
        self._patience = patience
        self._metrics = metrics
        self._members: dict[str, Sequence] = {}
        self._news = asyncio.Event()
        self._tasks = Tasks()

    # ------------------------------------------------------------ membership

    def enlist(self, sequence: Sequence) -> None:
        """The sequence is open at a verify worker and wants drafts."""
        self._members[sequence.sequence_id] = sequence
        self._news.set()

    def dismiss(self, sequence: Sequence) -> None:
        """It wants none any more, at least not under this epoch."""
        if self._members.pop(sequence.sequence_id, None) is not None:
            self._unseat(sequence)
            sequence.attaching = False

    def worker_left(self, link: DraftLink) -> None:
        """A draft worker is gone; what it had goes elsewhere."""
        for sequence in link.sequences.values():
            sequence.drafter = None
        link.sequences.clear()
        self._news.set()

    def wake(self) -> None:
        """A draft worker came, or its load changed."""
        self._news.set()

    async def run(self) -> None:
        """Attaches and moves sequences until cancelled."""
        async with self._tasks:
            while True:
                self._news.clear()
                guarded(self._balance)
                try:
                    async with asyncio.timeout(BALANCE_SECONDS):
                        await self._news.wait()
                except TimeoutError:
                    continue

    # ------------------------------------------------------------ attaching

    def _balance(self) -> None:
        """Gives every sequence a drafter that will stay, and every drafter a fair share."""
        now = time.monotonic()
        batches: dict[DraftLink, list[Sequence]] = defaultdict(list)
        for sequence in self._members.values():
            leaving = sequence.drafter is not None and sequence.drafter.load.draining
            if (sequence.drafter is not None and not leaving) or sequence.attaching or now < sequence.draft_retry_at:
                continue
            link = placement.choose_drafter(self._links.values(), sequence.model.info)
            if link is not None:
                self._assign(sequence, link, batches)
        for sequence, link in placement.even_out(self._links.values()):
            self._assign(sequence, link, batches)
        for link, batch in batches.items():
            self._tasks.start(self._attach(link, batch))

    @staticmethod
    def _assign(sequence: Sequence, link: DraftLink, batches: dict[DraftLink, list[Sequence]]) -> None:
        sequence.attaching = True
        link.attaching += 1
        batches[link].append(sequence)

    async def _attach(self, link: DraftLink, sequences: list[Sequence]) -> None:
        requests = [s.attachment(s.cohort.link.address if s.cohort is not None else "") for s in sequences]
        try:
            answers = await link.attach(requests)
        except DSparkError as error:
            answers = [Attached(request.key, error) for request in requests]
            for request in requests:
                link.release(request.key)  # it may be late only, and attach them yet
        finally:
            link.attaching -= len(sequences)
        for sequence, answer in zip(sequences, answers, strict=True):
            self._settle(link, sequence, answer)

    def _settle(self, link: DraftLink, sequence: Sequence, answer: Attached) -> None:
        current = sequence.sequence_id in self._members and sequence.key == answer.key
        if current:
            sequence.attaching = False
        if answer.error is not None:
            if current:
                self._refused(link, sequence, answer.error)
        elif not current:
            link.release(answer.key)
        elif link.alive:
            self._seat(sequence, link)

    def _seat(self, sequence: Sequence, link: DraftLink) -> None:
        self._unseat(sequence)  # the former drafter drafted until now
        sequence.drafter = link
        sequence.skip_rounds = sequence.misses = 0
        link.sequences[sequence.sequence_id] = sequence

    @staticmethod
    def _unseat(sequence: Sequence) -> None:
        link, sequence.drafter = sequence.drafter, None
        if link is not None:
            link.sequences.pop(sequence.sequence_id, None)
            link.release(sequence.key)

    def _refused(self, link: DraftLink, sequence: Sequence, error: DSparkError) -> None:
        sequence.draft_retry_at = time.monotonic() + RETRY_SECONDS
        if isinstance(error, Mismatch):  # no sequence of this model will do better there
            link.refused.add(sequence.model.info.model_fingerprint)
            _log.error("drafter does not fit", worker=link.worker_id, drafter=link.drafter.name, reason=str(error))
        else:
            request_id = sequence.request.request_id
            _log.warning("not attached", request_id=request_id, worker=link.worker_id, reason=str(error))

    # ------------------------------------------------------------ proposing

    @staticmethod
    def able(sequence: Sequence) -> bool:
        """Whether a block can be asked for now; if not, `propose` counts the round as missed."""
        link = sequence.drafter
        return link is not None and link.alive and link.late is None and sequence.skip_rounds == 0

    async def propose(self, asks: Iterable[Ask]) -> Drafts:
        """This round's blocks."""
        batches = self._batches(asks)
        if not batches:
            return Drafts()
        began = time.perf_counter()
        calls = {link: self._tasks.start(self._call(link, batch)) for link, batch in batches.items()}
        await asyncio.wait(calls.values(), timeout=self._patience.round)
        usable = [p for link, call in calls.items() for p in self._take(link, batches[link], call)]
        proposals = {proposal.key.sequence_id: proposal for proposal in usable}
        return Drafts(proposals, time.perf_counter() - began, _slowest(calls.values()))

    def _batches(self, asks: Iterable[Ask]) -> dict[DraftLink, list[_Call]]:
        batches: dict[DraftLink, list[_Call]] = defaultdict(list)
        for sequence, want in asks:
            link = sequence.drafter
            if link is None or not link.alive:
                self._metrics.missed("unattached")
            elif link.late is not None:
                self._metrics.missed("late")
            elif sequence.skip_rounds > 0:
                sequence.skip_rounds -= 1
                self._metrics.missed("features")
            else:
                item = ProposeItem(sequence.key, sequence.committed_len, sequence.token_ids[-1], want)
                batches[link].append((sequence, item))
        return batches

    async def _call(self, link: DraftLink, batch: list[_Call]) -> ProposeResult | None:
        try:
            return await link.propose([item for _, item in batch], self._patience.features, self._patience.worker)
        except DSparkError as error:
            link.fail(f"propose: {error}")
            return None

    def _take(self, link: DraftLink, batch: list[_Call], call: asyncio.Task[ProposeResult | None]) -> list[Proposal]:
        """One worker's blocks, if they came in time. A late worker is asked again only once it has answered."""
        if not call.done():
            link.late = call
            call.add_done_callback(partial(_caught_up, link))
        result = call.result() if call.done() and not call.cancelled() else None
        if result is None:
            self._metrics.missed("late", len(batch))
            return []
        link.rounds += 1
        self._metrics.drafted(result)
        _learn(link, batch, result)
        return [p for (s, item), p in zip(batch, result.proposals, strict=True) if self._use(link, s, item, p)]

    def _use(self, link: DraftLink, sequence: Sequence, item: ProposeItem, proposal: Proposal) -> bool:
        """Whether the proposal can be verified; otherwise notes the miss and what to do about it."""
        if proposal.error is None and (fault := _fault(sequence, item, proposal)) is None:
            sequence.misses = 0
            sequence.drafter_name = link.drafter.name
            link.tokens += len(proposal.tokens)
            return True
        if proposal.error is None:
            _log.error("unusable proposal", worker=link.worker_id, reason=fault)
        self._missed(link, sequence, proposal.error)
        return False

    def _missed(self, link: DraftLink, sequence: Sequence, error: DSparkError | None) -> None:
        lost = isinstance(error, UnknownSequence | StaleMessage)
        self._metrics.missed("lost" if lost else "unusable" if error is None else "features")
        if sequence.drafter is not link:  # it has moved since it was asked for, and its new drafter missed nothing
            return
        sequence.misses += 1
        sequence.skip_rounds = min(2**sequence.misses - 1, MAX_SKIPPED)  # its wait held the others up
        if lost or sequence.misses >= MAX_MISSES:
            sequence.misses = 0
            self._unseat(sequence)
            self._news.set()


def _slowest(calls: Iterable[asyncio.Task[ProposeResult | None]]) -> float:
    results = [call.result() for call in calls if call.done() and not call.cancelled()]
    return max((result.total_seconds for result in results if result is not None), default=0.0)


def _learn(link: DraftLink, batch: list[_Call], result: ProposeResult) -> None:
    """Whole blocks are what was profiled; of shorter ones it is learned what part of that they take."""
    served = [item for (_, item), p in zip(batch, result.proposals, strict=True) if p.error is None]
    if link.costs is None or not served:
        return
    longest = min(max(item.max_tokens for item in served), link.drafter.block_size)
    if sum(item.max_tokens >= longest for item in served) < ALIKE * len(served):
        return  # whole blocks beside short ones are neither
    requests = len(served) + result.other_requests
    context = sum(item.committed_len for item in served) / len(served)
    if longest == link.drafter.block_size:
        link.costs.observe(requests, context, result.total_seconds)
    elif not result.other_requests:  # of others' blocks it is not known how long they were
        link.parts.observe(longest, result.total_seconds / link.costs.predict(requests, context))


def _caught_up(link: DraftLink, _call: asyncio.Task[ProposeResult | None]) -> None:
    link.late = None


def _fault(sequence: Sequence, item: ProposeItem, proposal: Proposal) -> str | None:
    """What a drafter got wrong, if anything: a broken one must not break streams."""
    if proposal.committed_len != item.committed_len:
        return f"for committed_len {proposal.committed_len}, asked at {item.committed_len}"
    if len(proposal.tokens) > item.max_tokens:
        return f"{len(proposal.tokens)} tokens, asked for {item.max_tokens}"
    if any(token >= sequence.model.info.vocab_size for token in proposal.tokens):
        return "a token outside the vocabulary"
    sampling = sequence.request.sampling
    needs = sampling.mode is Mode.REJECTION and not sampling.greedy
    if needs and len(proposal.distributions) != len(proposal.tokens):
        return f"{len(proposal.distributions)} distributions for {len(proposal.tokens)} tokens"
    return None
