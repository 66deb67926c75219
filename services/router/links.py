"""The router's live connection to one worker: typed calls over one session, and what is known of its load.

A link lives as long as its stream. Whether the store still lists the worker only decides if new work goes there.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from dspark.costs import CostModel, CostProfile, Refined
from dspark.errors import DSparkError, InternalError, Unavailable
from dspark.messages import (
    Attached,
    AttachSequence,
    DrafterInfo,
    ModelInfo,
    Opened,
    OpenSequence,
    ProposeItem,
    ProposeResult,
    SequenceKey,
    StepItem,
    StepResult,
    WorkerLoad,
)
from dspark.rpc import codec, pieces
from dspark.rpc.session import Session
from dspark.v1 import draft_pb2
from services.router.parts import Parts
from services.router.unasked import Unasked

if TYPE_CHECKING:
    from services.router.sequences import Sequence

__all__ = ["CALL_SECONDS", "DraftLink", "Link", "VerifierLink"]

_log = structlog.get_logger(__name__)
CALL_SECONDS = 30.0  # of calls that no round waits for


class Link(ABC):
    """What both kinds of workers have in common.

    Attributes:
        listed: the store's latest reading holds the worker; without, it gets new work only if no other can.
        rounds, tokens: batches that this router had it do, and the tokens these came to.
        on_load: called after a reading of its load by which it may have other room than by the one before.
        costs: what its steps cost, from the profile it has published and the steps this router saw; None without one.
    """

    def __init__(self, worker_id: str, address: str, session: Session[Any, Any], load: WorkerLoad) -> None:
        self.worker_id = worker_id
        self.address = address
        self.listed = True
        self.rounds = 0
        self.tokens = 0
        self.on_load: Callable[[], None] = _nothing
        self.costs: Refined | None = None
        self._profile: CostProfile | None = None
        self._session = session
        self._releasing: list[SequenceKey] = []
        self._release: asyncio.Task[None] | None = None
        self._failed = asyncio.Event()
        self.failure = ""
        self.load = load
        self.read_load(load)

    @property
    @abstractmethod
    def own(self) -> int:
        """Sequences that this router has or is about to have there."""

    # ------------------------------------------------------------ load

    def read_load(self, load: WorkerLoad) -> None:
        """Takes a reading; what it counts beyond our own sequences is other routers'."""
        former, self.load = self.load, load
        self.load_at = time.monotonic()
        self._others = max(0, load.running - self.own)
        if _room(former) != _room(load):
            self.on_load()

    @property
    def load_age(self) -> float:
        """Seconds since the latest reading."""
        return time.monotonic() - self.load_at

    @property
    def others(self) -> int:
        """Other routers' sequences on the worker, as last read."""
        return self._others

    @property
    def occupancy(self) -> int:
        """Sequences on the worker: other routers' as last read, and our own as of now."""
        return self._others + self.own

    def take_profile(self, profile: CostProfile | None) -> None:
        """The worker's published profile, as the store has it; what steps taught goes with an older one."""
        if profile is not None and profile is not self._profile:
            self._profile = profile
            self.costs = Refined(CostModel(profile))

    # ------------------------------------------------------------ end

    def fail(self, reason: str) -> None:
        """Gives the worker up: it missed a deadline or broke the protocol."""
        self.failure = self.failure or reason
        self._failed.set()

    @property
    def alive(self) -> bool:
        """Whether calls can still succeed."""
        return not self._failed.is_set() and not self._session.broken.is_set()

    async def ended(self) -> str:
        """Returns why, once the stream breaks or the worker is given up."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._failed, self._session.broken)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.failure or "the stream broke"

    # ------------------------------------------------------------ calls

    def release(self, key: SequenceKey) -> None:
        """Frees a sequence at the worker, without waiting; several at once share a call."""
        self._releasing.append(key)
        if self._release is None or self._release.done():
            self._release = asyncio.create_task(self._release_all())

    async def _release_all(self) -> None:
        await asyncio.sleep(0)  # let the rest of the round's join
        while self._releasing:
            keys, self._releasing = self._releasing, []
            try:
                await self._free(keys)
            except DSparkError as error:  # a worker that is gone has freed them by going
                _log.debug("sequences not released", worker=self.worker_id, count=len(keys), error=str(error))

    @abstractmethod
    async def _free(self, keys: list[SequenceKey]) -> None:
        """Tells the worker to forget sequences."""

    async def _call(self, request: Any, timeout: float) -> Any:  # noqa: ASYNC109 - the session's own parameter
        if not self.alive:
            raise Unavailable(f"{self.worker_id}: {self.failure or 'the stream broke'}")
        reply = await self._session.call(request, timeout=timeout)
        self.read_load(codec.decode(reply.load))
        return reply


class VerifierLink(Link):
    """A verify worker."""

    def __init__(
        self,
        worker_id: str,
        address: str,
        session: Session[Any, Any],
        load: WorkerLoad,
        *,
        model: ModelInfo,
        page_size: int,
        max_step_tokens: int,
        fetch_tokenizer: Callable[[], Any],
    ) -> None:
        self.model = model
        self._fetch_tokenizer = fetch_tokenizer
        self.page_size = max(1, page_size)
        self.max_step_tokens = max(1, max_step_tokens)
        self.sequences: dict[str, Sequence] = {}
        self.opening: dict[str, int] = {}  # sequence_id: pages it will take
        self.hold_until = 0.0  # it had no pages a moment ago
        super().__init__(worker_id, address, session, load)

    @property
    def own(self) -> int:
        """Sequences of this router there, arriving ones included."""
        return len(self.sequences) + len(self.opening)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    @property
    def free_pages(self) -> int:
        """As last read, less what is being opened."""
        return self.load.free_pages - sum(self.opening.values())

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that can ever be open there."""
        return self.load.total_pages * self.page_size

    async def fetch_tokenizer(self) -> dict[str, bytes]:
        """`tokenizer.json` and `model.json` of its target."""
        return await pieces.join(self._fetch_tokenizer())

    async def open(self, sequences: list[OpenSequence]) -> list[Opened]:
        """One answer per sequence, in their order."""
        reply = await self._call(codec.open_call(sequences), CALL_SECONDS)
        return _matching(sequences, codec.decode(reply.opened), self.worker_id)

    async def step(self, items: list[StepItem], timeout: float) -> StepResult:  # noqa: ASYNC109 - as the session's
        """One verdict per item, in their order."""
        reply = await self._call(codec.step_call(items), timeout)
        result: StepResult = codec.decode(reply.step)
        _matching(items, result.verdicts, self.worker_id)
        return result

    async def _free(self, keys: list[SequenceKey]) -> None:
        await self._call(codec.close_call(keys), CALL_SECONDS)


class DraftLink(Link):
    """A draft worker.

    Attributes:
        late: the call that missed the round's deadline, until it ends; nothing more is asked meanwhile.
        parts: what less than whole blocks take, as a share of `costs`.
    """

    def __init__(
        self, worker_id: str, address: str, session: Session[Any, Any], load: WorkerLoad, *, drafter: DrafterInfo
    ) -> None:
        self.drafter = drafter
        self.sequences: dict[str, Sequence] = {}
        self.attaching = 0
        self.late: asyncio.Task[ProposeResult | None] | None = None
        self.parts = Parts(drafter.block_size)
        self.refused: set[str] = set()  # model fingerprints that do not go with this drafter
        self.unasked = Unasked(self._has)
        self.on_unasked: Callable[[int], None] = _no_count
        session.on_unasked = self._take_unasked
        super().__init__(worker_id, address, session, load)

    @property
    def own(self) -> int:
        """Sequences of this router there, arriving ones included."""
        return len(self.sequences) + self.attaching

    def fits(self, model: ModelInfo) -> bool:
        """Whether this drafter can draft for the model, as far as descriptions and earlier refusals tell."""
        return (
            self.drafter.vocab_size == model.vocab_size
            and self.drafter.model_fingerprint in {"", model.model_fingerprint}
            and model.model_fingerprint not in self.refused
        )

    async def attach(self, sequences: list[AttachSequence]) -> list[Attached]:
        """One answer per sequence, in their order."""
        reply = await self._call(codec.attach_call(sequences), CALL_SECONDS)
        return _matching(sequences, codec.decode(reply.attached), self.worker_id)

    async def propose(self, items: list[ProposeItem], wait: float, timeout: float) -> ProposeResult:  # noqa: ASYNC109
        """One proposal per item, in their order."""
        reply = await self._call(codec.propose_call(items, wait), timeout)
        result: ProposeResult = codec.decode(reply.proposed)
        _matching(items, result.proposals, self.worker_id)
        return result

    def release(self, key: SequenceKey) -> None:
        """As every link's; blocks of the sequence that come unasked are dropped."""
        self.unasked.forget([key])
        super().release(key)

    def _take_unasked(self, reply: draft_pb2.DraftReply) -> None:
        """Blocks of sequences that the worker stays with; of those that have left it nobody wants any."""
        try:
            load, result = codec.decode(reply.load), codec.decode(reply.proposed)
        except DSparkError as error:
            self.fail(f"unasked: {error}")
            return
        self.read_load(load)
        self.on_unasked(len(result.proposals))
        self.unasked.add(result)

    def _has(self, key: SequenceKey) -> bool:
        sequence = self.sequences.get(key.sequence_id)
        return sequence is not None and sequence.key == key

    async def _free(self, keys: list[SequenceKey]) -> None:
        await self._call(codec.detach_call(keys), CALL_SECONDS)


def _room(load: WorkerLoad) -> tuple[bool, int, int]:
    """What decides whether it may be given more."""
    return load.draining, load.running, load.free_pages


def _nothing() -> None:
    """Nobody listens yet."""


def _no_count(_blocks: int) -> None:
    """Nobody counts yet."""


def _matching(asked: list[Any], answered: Any, worker_id: str) -> list[Any]:
    """The answers, if they are about what was asked."""
    if [item.key for item in asked] != [item.key for item in answered]:
        raise InternalError(f"{worker_id}: the reply is not about the sequences that were asked for")
    return list(answered)
