"""One round's proposals: asked for, or on their way unasked. A missing one costs only the drafts.

A sequence whose drafter is late or lacks its features is verified plainly. One that is drafted for round after round is
not asked for each time: its drafter is told to stay with it and begins with the next block as soon as the verify worker
has sent what it committed, while this router still reads the verdicts.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

import structlog

from dspark.errors import DSparkError, StaleMessage, UnknownSequence
from dspark.messages import Proposal, ProposeItem, ProposeResult
from services.router.blocks import fault_of, learn
from services.router.drafting import Drafting
from services.router.links import DraftLink
from services.router.metrics import Metrics
from services.router.options import Patience
from services.router.sequences import Sequence as Running
from services.router.tasks import Tasks, later

__all__ = ["Ask", "Drafts", "Proposing"]

_log = structlog.get_logger(__name__)
MAX_SKIPPED = 8
MAX_MISSES = 6  # in a row, before the sequence is attached anew
SLACK = 1  # tokens that may come unasked beyond what is worth it, before that is changed
DISTRUST = 32  # rounds in which nothing is expected unasked, after a block that should have come so and did not


class Ask(NamedTuple):
    """A sequence, how many draft tokens are wanted for it now, and how many of the blocks after that.

    One of which none are wanted now joins the others: its next block is to come with theirs.
    """

    sequence: Running
    want: int
    following: int


_Asked: TypeAlias = tuple[Running, ProposeItem]
_Batches: TypeAlias = Mapping[DraftLink, Sequence[_Asked]]


@dataclass(frozen=True, slots=True)
class Drafts:
    """One round's blocks.

    Attributes:
        proposals: by sequence id; sequences without one are missing.
        seconds: that the round waited for them.
        engine_seconds: what the slowest draft worker's engine took for them; 0 where no block came.
        begins: some drafter was asked that stays from now on: further rounds will wait less.
    """

    proposals: Mapping[str, Proposal] = field(default_factory=dict)
    seconds: float = 0.0
    engine_seconds: float = 0.0
    begins: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    link: DraftLink
    batch: Sequence[_Asked]
    task: asyncio.Task[ProposeResult | None]

    @property
    def result(self) -> ProposeResult | None:
        """None also while it is not done."""
        return self.task.result() if self.task.done() and not self.task.cancelled() else None


@dataclass(slots=True)
class _Gathered:
    """What has come of a round's blocks."""

    proposals: dict[str, Proposal] = field(default_factory=dict)
    engine_seconds: float = 0.0
    begins: bool = False
    missed: dict[DraftLink, list[_Asked]] = field(default_factory=lambda: defaultdict(list))  # did not come unasked


class Proposing:
    """Rounds' proposals. `drafting` knows who has which draft worker."""

    def __init__(self, drafting: Drafting, *, patience: Patience, metrics: Metrics) -> None:
        self._drafting = drafting
        self._patience = patience
        self._metrics = metrics
        self._tasks = Tasks()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.__aexit__(kind, error, trace)

    @staticmethod
    def able(sequence: Running) -> bool:
        """Whether a block can be asked for now; if not, `propose` counts the round as missed."""
        link = sequence.drafter
        return link is not None and link.alive and link.late is None and sequence.skip_rounds == 0

    async def propose(self, asks: Sequence[Ask], running: Sequence[Running]) -> Drafts:
        """This round's blocks. `running`: all who take part in it; nobody stays with who is not asked for."""
        self._leave(running, {ask.sequence.sequence_id for ask in asks})
        asked, coming = self._sorted(asks)
        began = time.perf_counter()
        gathered = _Gathered()
        calls = self._start(asked)
        await self._await_unasked(coming, gathered)
        fresh = {sequence.sequence_id for batch in asked.values() for sequence, _ in batch}
        later(self._change, [ask for ask in asks if ask.sequence.sequence_id not in fresh])
        if not asked and not coming:
            return Drafts()
        calls += self._start(gathered.missed)
        if calls:
            await asyncio.wait([call.task for call in calls], timeout=self._patience.round)
        for call in calls:
            self._take(call, gathered)
        seconds = time.perf_counter() - began
        return Drafts(gathered.proposals, seconds, gathered.engine_seconds, gathered.begins)

    def _sorted(self, asks: Iterable[Ask]) -> tuple[_Batches, _Batches]:
        """By draft worker: what to ask for, and what comes unasked."""
        asked: dict[DraftLink, list[_Asked]] = defaultdict(list)
        coming: dict[DraftLink, list[_Asked]] = defaultdict(list)
        for sequence, want, following in asks:
            link = sequence.drafter
            if link is None or not link.alive:
                self._metrics.missed("unattached")
            elif link.late is not None:
                self._metrics.missed("late")
            elif sequence.skip_rounds > 0:
                sequence.skip_rounds -= 1
                self._metrics.missed("features")
            elif want:
                sequence.steady += 1
                batches = coming if want <= sequence.standing <= 2 * max(want, following) else asked
                batches[link].append((sequence, _item(sequence, want, stay=following > 0)))
        return asked, coming

    # ------------------------------------------------------------ asked for

    def _start(self, batches: _Batches) -> list[_Call]:
        return [_Call(link, batch, self._tasks.start(self._ask(link, batch))) for link, batch in batches.items()]

    async def _ask(self, link: DraftLink, batch: Sequence[_Asked]) -> ProposeResult | None:
        try:
            return await link.propose([item for _, item in batch], self._patience.features, self._patience.worker)
        except DSparkError as error:
            link.fail(f"propose: {error}")
            return None

    def _take(self, call: _Call, gathered: _Gathered) -> None:
        """One worker's blocks, if they came in time. A late worker is asked again only once it has answered."""
        link, batch, result = call.link, call.batch, call.result
        if not call.task.done():
            link.late = call.task
            call.task.add_done_callback(partial(self._caught_up, call))
        if result is None:
            self._metrics.missed("late", len(batch))
            return
        gathered.engine_seconds = max(gathered.engine_seconds, result.total_seconds)
        self._count(link, result)
        learn(link, [item for (_, item), p in zip(batch, result.proposals, strict=True) if p.error is None], result)
        for (sequence, item), proposal in zip(batch, result.proposals, strict=True):
            if self._use(link, sequence, item, proposal):
                if _belongs(sequence, link, item):
                    gathered.begins |= proposal.stays and not sequence.standing
                    sequence.followed |= proposal.stays
                    sequence.standing = item.max_tokens if proposal.stays else 0
                gathered.proposals[sequence.sequence_id] = proposal

    def _count(self, link: DraftLink, result: ProposeResult) -> None:
        link.rounds += 1
        self._metrics.drafted(result)

    def _use(self, link: DraftLink, sequence: Running, item: ProposeItem, proposal: Proposal) -> bool:
        """Whether the proposal can be verified; otherwise notes the miss and what to do about it."""
        if proposal.error is None and (fault := fault_of(sequence, item, proposal)) is None:
            sequence.misses = 0
            sequence.drafter_name = link.drafter.name
            link.tokens += len(proposal.tokens)
            return True
        if proposal.error is None:
            _log.error("unusable proposal", worker=link.worker_id, reason=fault)
        self._missed(link, sequence, proposal.error)
        return False

    def _missed(self, link: DraftLink, sequence: Running, error: DSparkError | None) -> None:
        lost = isinstance(error, UnknownSequence | StaleMessage)
        self._metrics.missed("lost" if lost else "unusable" if error is None else "features")
        if sequence.drafter is not link:  # it has moved since it was asked for, and its new drafter missed nothing
            return
        sequence.standing = 0
        sequence.misses += 1
        sequence.skip_rounds = min(2**sequence.misses - 1, MAX_SKIPPED)  # its wait held the others up
        if lost or sequence.misses >= MAX_MISSES:
            self._drafting.lost(sequence)

    # ------------------------------------------------------------ unasked

    async def _await_unasked(self, coming: _Batches, gathered: _Gathered) -> None:
        """Blocks of sequences that drafters stay with; what does not come in the time that features have is missed."""
        until = time.perf_counter() + self._patience.features
        for link, batch in coming.items():
            lengths = {sequence.key: item.committed_len for sequence, item in batch}
            await link.unasked.wait(lengths, max(0.0, until - time.perf_counter()))
            self._take_unasked(link, batch, gathered)

    def _take_unasked(self, link: DraftLink, batch: Sequence[_Asked], gathered: _Gathered) -> None:
        drafted: dict[int, tuple[ProposeResult, list[ProposeItem]]] = {}
        for sequence, item in batch:
            if not _belongs(sequence, link, item):
                continue  # it has ended or moved meanwhile
            came = link.unasked.find(item.key, item.committed_len)
            if came is None:
                sequence.standing, sequence.steady = 0, -DISTRUST
                gathered.missed[link].append((sequence, replace(item, stay=False)))
                continue
            _, items = drafted.setdefault(id(came.result), (came.result, []))
            items.append(replace(item, max_tokens=sequence.standing))
            proposal = came.cut(item.max_tokens).proposal
            if self._use(link, sequence, item, proposal):
                gathered.proposals[sequence.sequence_id] = proposal
        for result, _ in drafted.values():
            gathered.engine_seconds = max(gathered.engine_seconds, result.total_seconds)
        later(self._learn, link, list(drafted.values()))

    def _learn(self, link: DraftLink, drafted: Sequence[tuple[ProposeResult, Sequence[ProposeItem]]]) -> None:
        """Of blocks that came unasked and were used, once the round is on its way."""
        for result, items in drafted:
            self._count(link, result)
            if len(items) == len(result.proposals):
                learn(link, items, result)
        self._metrics.unasked_used(sum(len(items) for _, items in drafted))

    def _change(self, asks: Iterable[Ask]) -> None:
        """Blocks of other lengths are to come unasked from the next features on."""
        changed: dict[DraftLink, list[_Asked]] = defaultdict(list)
        for sequence, want, following in asks:
            link, standing = sequence.drafter, sequence.standing
            joins = not want and sequence.steady >= 0
            if link is not None and (standing or joins) and not following <= standing <= following + SLACK:
                sequence.standing = following
                changed[link].append((sequence, _order(sequence, following)))
        self._send(changed)

    def _leave(self, running: Iterable[Running], asked: set[str]) -> None:
        """Nobody stays with a sequence that this round does not ask for."""
        left: dict[DraftLink, list[_Asked]] = defaultdict(list)
        for sequence in running:
            if sequence.sequence_id in asked:
                continue
            sequence.steady = min(sequence.steady, 0)
            if sequence.standing and sequence.drafter is not None:
                sequence.standing = 0
                left[sequence.drafter].append((sequence, _order(sequence, 0)))
        self._send(left)

    def _send(self, orders: _Batches) -> None:
        """Nobody waits for the answers."""
        for call in self._start(orders):
            call.task.add_done_callback(partial(self._ordered, call))

    @staticmethod
    def _ordered(call: _Call, _task: asyncio.Task[ProposeResult | None]) -> None:
        """What the worker did not take on will not come."""
        for (sequence, item), proposal in zip(call.batch, call.result.proposals if call.result else (), strict=False):
            if item.max_tokens and not proposal.stays and _belongs(sequence, call.link, item):
                sequence.standing = 0

    def _caught_up(self, call: _Call, _task: asyncio.Task[ProposeResult | None]) -> None:
        """The worker may be asked again. It stays with none of those for whom it was too late."""
        link = call.link
        link.late = None
        stayed = [
            (s, _order(s, 0)) for s, item in call.batch if item.stay and _belongs(s, link, item) and not s.standing
        ]
        if stayed and link.alive:
            self._send({link: stayed})


def _item(sequence: Running, want: int, *, stay: bool) -> ProposeItem:
    stays = stay and sequence.steady > 0
    return ProposeItem(sequence.key, sequence.committed_len, sequence.token_ids[-1], want, stay=stays)


def _order(sequence: Running, following: int) -> ProposeItem:
    """What comes unasked from the next features on."""
    return ProposeItem(
        sequence.key, sequence.committed_len, sequence.token_ids[-1], following, stay=following > 0, later=True
    )


def _belongs(sequence: Running, link: DraftLink, item: ProposeItem) -> bool:
    """Whether the sequence still is what the item was about, and this drafter's."""
    return sequence.drafter is link and sequence.key == item.key
