"""One verify worker, seen from a draft worker: our tap registered there and one stream of features, kept alive.

A drafter without a tap has a stream of token ids all the same; "features" below means what it carries.

Whatever breaks (connection, registration, a subscription) is tried again with growing pauses for as long as somebody
wants the sequence; asking again always starts at the first position that is not here yet. Knows no tensors and no
engine: blocks go to the inbox. How wishes and blocks travel is known by `wire.py`, and where both workers are one
process by `services.pair`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import structlog

from dspark.ending import end
from dspark.errors import DSparkError, FeaturesMissing, InternalError, InvalidRequest, Mismatch, Unavailable
from dspark.messages import FeatureBlock, SequenceKey
from dspark.rpc.channel import error_from_call
from services.draft.inbox import FeatureInbox
from services.draft.offer import TapOffer

__all__ = ["Connect", "VerifierLink", "Wish"]

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_LONGEST_ASK_PAUSE = 1.0
_PULL_PAUSE = 0.2  # a pull under way answers every gap that is seen meanwhile

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Wish:
    """To be sent a sequence's features from a position on; None: no more."""

    key: SequenceKey
    position: int | None


@dataclass(slots=True)
class _Want:
    """One sequence wanted from the verify worker."""

    pause: float = _FIRST_PAUSE
    asked_at: float = -1.0
    retry: asyncio.TimerHandle | None = None


class VerifierLink(ABC):
    """For `async with`: connected from entry to exit, reconnecting as needed."""

    def __init__(self, address: str, offer: TapOffer, inbox: FeatureInbox) -> None:
        self.address = address
        self.offer = offer
        self._inbox = inbox
        self._wants: dict[SequenceKey, _Want] = {}
        self._needed_at = time.monotonic()
        self._send: Callable[[Wish], object] | None = None  # while there is a stream
        self._settled = asyncio.Event()
        self._refusal: DSparkError | None = None
        self._reason = ""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in tuple(self._wants):
            self.drop(key)
        await end(self._task)

    @property
    def idle_seconds(self) -> float:
        """For how long no sequence has been wanted from here."""
        return 0.0 if self._wants else time.monotonic() - self._needed_at

    @property
    def connected(self) -> bool:
        """Whether the tap, if any, is registered and the stream open."""
        return self._send is not None

    async def ready(self, seconds: float) -> None:
        """Returns once connected. `Mismatch` where the drafter does not fit, `Unavailable` if it takes too long."""
        try:
            async with asyncio.timeout(seconds):
                await self._settled.wait()
        except TimeoutError as error:
            why = f": {self._reason}" if self._reason else ""
            raise Unavailable(f"no features from verify worker {self.address} within {seconds:g} s{why}") from error
        if self._refusal is not None:
            raise self._refusal

    def want(self, key: SequenceKey) -> None:
        """Have a sequence's features sent, from the first position that the inbox lacks."""
        self._wants.setdefault(key, _Want())
        self._ask(key)

    def pull(self, key: SequenceKey) -> None:
        """Ask again: something is missing. Repeats within a short while are one."""
        want = self._wants.get(key)
        now = asyncio.get_running_loop().time()
        if want is not None and now - want.asked_at >= _PULL_PAUSE:
            self._ask(key)

    def drop(self, key: SequenceKey) -> None:
        """Stop wanting a sequence."""
        want = self._wants.pop(key, None)
        self._needed_at = time.monotonic()
        if want is not None and want.retry is not None:
            want.retry.cancel()
        if want is not None and self._send is not None:
            self._send(Wish(key, None))

    # ------------------------------------------------------------ connection

    async def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                await self._connected()
                pause = _FIRST_PAUSE
            except grpc.aio.AioRpcError as error:
                pause = self._failed(error_from_call(error, worker=True), pause)
            except DSparkError as error:
                pause = self._failed(error, pause)
            except Exception as error:  # noqa: BLE001 - were the task to end here, no features would ever come again
                _log.exception("a features stream failed", verifier=self.address)
                pause = self._failed(InternalError(f"{type(error).__name__}: {error}"), pause)
            finally:
                self._send = None
            await asyncio.sleep(pause)

    def _failed(self, error: DSparkError, pause: float) -> float:
        """Note why there is no stream; returns the next pause."""
        refused = isinstance(error, (Mismatch, InvalidRequest))
        if refused != (self._refusal is not None) or pause == _FIRST_PAUSE:
            _log.warning("no features from verify worker", verifier=self.address, reason=str(error))
        self._refusal = error if refused else None
        self._reason = str(error)
        if refused:
            self._settled.set()
        else:
            self._settled.clear()
        return _LONGEST_PAUSE if refused else min(2 * pause, _LONGEST_PAUSE)

    @abstractmethod
    async def _connected(self) -> None:
        """Register the tap, say so by `_opened`, and pass blocks to `receive` until the stream breaks; raises why."""

    def _opened(self, send: Callable[[Wish], object]) -> None:
        """There is a stream: wishes go this way from now on, those that are open first."""
        self._send, self._refusal = send, None
        self._settled.set()
        _log.info("features stream open", verifier=self.address, sequences=len(self._wants))
        for key in self._wants:
            self._ask(key)

    # ------------------------------------------------------------ sequences

    def _ask(self, key: SequenceKey) -> None:
        """Subscribe from our position; without a connection this happens once there is one."""
        want, position = self._wants.get(key), self._inbox.length(key)
        if want is None or position is None or self._send is None:
            return
        want.retry = None
        want.asked_at = asyncio.get_running_loop().time()
        self._send(Wish(key, position))

    def receive(self, block: FeatureBlock) -> None:
        """Takes what came. Raises `Unavailable` where the stream is of no use any more."""
        if block.error is not None:
            self._refused(block.key, block.error)
        elif len(block.data) != block.count * self.offer.row_bytes or len(block.token_ids) != block.count:
            got = f"{len(block.data)} feature bytes and {len(block.token_ids)} token ids"
            raise Unavailable(f"{got} for {block.count} positions")
        elif (want := self._wants.get(block.key)) is not None:
            want.pause = _FIRST_PAUSE
            self._inbox.feed(block)

    def _refused(self, key: SequenceKey, error: DSparkError) -> None:
        """A subscription was refused or ended: not open there (yet), or our tap was forgotten."""
        want = self._wants.get(key)
        if isinstance(error, Mismatch):
            raise Unavailable(f"the verify worker does not know our tap any more: {error}")
        if want is None or isinstance(error, (FeaturesMissing, Unavailable)):  # recomputed there, and on its way
            return
        if isinstance(error, InvalidRequest):
            _log.error("features refused", sequence=key.sequence_id, epoch=key.epoch, reason=str(error))
            return
        if want.retry is None:
            want.retry = asyncio.get_running_loop().call_later(want.pause, self._ask, key)
            want.pause = min(2 * want.pause, _LONGEST_ASK_PAUSE)


Connect = Callable[[str, TapOffer, FeatureInbox], VerifierLink]
"""Makes the link to the verify worker at an address."""
