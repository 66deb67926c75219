"""The queue of sequences that are open nowhere, and their opening at verify workers with room.

First come, first served, and who was running before goes first: a sequence whose worker died, or whose pages were
gone when it came to open. Where the first in line does not fit, later ones wait too, or large requests would starve.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from dspark.errors import DSparkError, InvalidRequest, OutOfPages, Unavailable
from dspark.messages import Opened, SequenceKey
from services.router import placement
from services.router.links import VerifierLink
from services.router.sequences import Sequence
from services.router.tasks import Tasks, guarded

__all__ = ["Dispatcher"]

_log = structlog.get_logger(__name__)
RETRY_SECONDS = 0.05  # between two looks at workers that had no room


@dataclass(order=True, slots=True)
class _Waiting:
    moved: int  # 0: was running before
    number: int
    sequence: Sequence = field(compare=False)
    homeless_since: float | None = field(compare=False, default=None)


class Dispatcher:
    """Gives waiting sequences to verify workers.

    Args:
        links: the connected verify workers, by id; a live view.
        max_running: sequences of this router that one worker may have.
        worker_wait: seconds that a sequence waits while no worker at all could serve it.
        features: whether drafters may want a sequence.
        opened: takes each sequence that a worker has opened.
        failed: takes each that cannot be served, and why.
    """

    def __init__(
        self,
        links: Mapping[str, VerifierLink],
        *,
        max_running: int,
        worker_wait: float,
        features: Callable[[Sequence], bool],
        opened: Callable[[Sequence, VerifierLink], None],
        failed: Callable[[Sequence, DSparkError], None],
    ) -> None:
        self._links = links
        self._max_running = max_running
        self._worker_wait = worker_wait
        self._features = features
        self._opened = opened
        self._failed = failed
        self._queue: list[_Waiting] = []
        self._numbers = itertools.count()
        self._news = asyncio.Event()
        self._tasks = Tasks()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def moving(self) -> bool:
        """Whether a sequence waits that was running before."""
        return bool(self._queue) and self._queue[0].moved == 0

    def put(self, sequence: Sequence, *, moved: bool = False) -> None:
        """In line; `moved` ones before all others."""
        bisect.insort(self._queue, _Waiting(0 if moved else 1, next(self._numbers), sequence))
        self.wake()

    def remove(self, sequence: Sequence) -> None:
        """Out of line, if it is there."""
        self._queue = [waiting for waiting in self._queue if waiting.sequence is not sequence]

    def wake(self) -> None:
        """Something has changed: a sequence, a worker, a load."""
        if self._queue:
            self._news.set()

    async def run(self) -> None:
        """Places sequences until cancelled; openings under way end with it."""
        async with self._tasks:
            while True:
                if not self._queue:
                    await self._news.wait()
                self._news.clear()
                guarded(self._place)
                try:
                    async with asyncio.timeout(RETRY_SECONDS):
                        await self._news.wait()
                except TimeoutError:
                    continue

    # ------------------------------------------------------------ placing

    def _place(self) -> None:
        """Assigns what fits; one call for all that go to the same worker."""
        now = time.monotonic()
        batches: dict[VerifierLink, list[_Waiting]] = {}
        blocked: set[VerifierLink] = set()  # somebody earlier in line waits for room there
        for waiting in list(self._queue):
            able = [link for link in self._links.values() if placement.may_serve(link, waiting.sequence)]
            if not able:
                self._note_homeless(waiting, now)
                continue
            waiting.homeless_since = None
            link = self._choose([link for link in able if link not in blocked], waiting.sequence, now)
            if link is None:
                blocked.update(able)
                continue
            self._queue.remove(waiting)
            link.opening[waiting.sequence.sequence_id] = link.pages(waiting.sequence.request.max_len)
            batches.setdefault(link, []).append(waiting)
        for link, batch in batches.items():
            self._tasks.start(self._open(link, batch))

    def _choose(self, able: list[VerifierLink], sequence: Sequence, now: float) -> VerifierLink | None:
        roomy = [link for link in able if placement.has_room(link, sequence, max_running=self._max_running, now=now)]
        return placement.choose_verifier(roomy)

    def _note_homeless(self, waiting: _Waiting, now: float) -> None:
        if waiting.homeless_since is None:
            waiting.homeless_since = now
        elif now - waiting.homeless_since > self._worker_wait:
            self._queue.remove(waiting)
            reason = f"no verify worker that can serve it came within {self._worker_wait:g} s"
            self._failed(waiting.sequence, Unavailable(reason))

    # ------------------------------------------------------------ opening

    async def _open(self, link: VerifierLink, batch: list[_Waiting]) -> None:
        requests = [own.sequence.opening(features=self._features(own.sequence)) for own in batch]
        try:
            answers = await link.open(requests)
        except DSparkError as error:  # of the whole call: the worker is gone or about to go
            answers = [Opened(request.key, error=error) for request in requests]
            for request in requests:
                link.release(request.key)  # it may be late only, and open them yet
        finally:
            for waiting in batch:
                link.opening.pop(waiting.sequence.sequence_id, None)
        for waiting, answer in zip(batch, answers, strict=True):
            self._settle(link, waiting, answer)
        self.wake()

    def _settle(self, link: VerifierLink, waiting: _Waiting, answer: Opened) -> None:
        sequence = waiting.sequence
        if answer.error is None:
            self._accept(link, sequence, answer.key, answer.computed_len)
        elif sequence.ended:
            return
        elif isinstance(answer.error, InvalidRequest):
            self._failed(sequence, answer.error)
        else:
            self._postpone(link, waiting, answer.error)

    def _accept(self, link: VerifierLink, sequence: Sequence, key: SequenceKey, computed_len: int) -> None:
        if sequence.ended:  # the client left meanwhile
            link.release(key)
            return
        if not link.alive:
            self.put(sequence, moved=True)
            return
        sequence.opened(computed_len, link.model.numerics_fingerprint)
        self._opened(sequence, link)

    def _postpone(self, link: VerifierLink, waiting: _Waiting, error: DSparkError) -> None:
        """Back to where it stood in line."""
        link.hold_until = time.monotonic() + RETRY_SECONDS
        if not isinstance(error, OutOfPages | Unavailable):
            _log.warning(
                "opening refused",
                request_id=waiting.sequence.request.request_id,
                worker=link.worker_id,
                reason=str(error),
            )
            waiting.sequence.failures += 1
            if waiting.sequence.hopeless:
                self._failed(waiting.sequence, error)
                return
        bisect.insort(self._queue, waiting)
