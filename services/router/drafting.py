"""Which draft worker each sequence has.

Attaching never holds a round up: a sequence without a drafter is verified plainly. What drafters are asked for is up to
`proposing.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping

import structlog

from dspark.errors import DSparkError, Mismatch
from dspark.messages import Attached
from services.router import placement
from services.router.links import DraftLink
from services.router.sequences import Sequence
from services.router.tasks import Tasks, guarded

__all__ = ["Drafting"]

_log = structlog.get_logger(__name__)
BALANCE_SECONDS = 0.25
RETRY_SECONDS = 1.0  # after a refused attachment


class Drafting:
    """Attachments of sequences to draft workers. `links` is a live view of the connected ones."""

    def __init__(self, links: Mapping[str, DraftLink]) -> None:
        self._links = links
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

    def lost(self, sequence: Sequence) -> None:
        """Its drafter cannot draft for it any more: it is attached anew."""
        sequence.misses = 0
        self._unseat(sequence)
        self._news.set()

    def worker_left(self, link: DraftLink) -> None:
        """A draft worker is gone; what it had goes elsewhere."""
        left = list(link.sequences.values())
        link.sequences.clear()
        for sequence in left:
            sequence.undrafted()
        link.unasked.forget([sequence.key for sequence in left])
        self._news.set()

    def wake(self) -> None:
        """A draft worker came, or its load changed; or a sequence is no longer dormant."""
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
        """Gives every sequence that is not dormant a drafter that will stay, and every drafter a fair share."""
        now = time.monotonic()
        batches: dict[DraftLink, list[Sequence]] = defaultdict(list)
        for sequence in self._members.values():
            leaving = sequence.drafter is not None and sequence.drafter.load.draining
            attached = sequence.attaching or (sequence.drafter is not None and not leaving)
            if attached or sequence.dormant or now < sequence.draft_retry_at:
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
        link = sequence.drafter
        sequence.undrafted()
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
