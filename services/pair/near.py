"""The verify worker of one's own process, as the draft worker sees it: features without a wire.

They go from the engine's thread to the event loop and back, in the order in which they came.
"""

from __future__ import annotations

import asyncio
from functools import partial

from services.draft.inbox import FeatureInbox
from services.draft.link import VerifierLink, Wish
from services.draft.offer import TapOffer
from services.draft.wire import WireLink
from services.verifier.subscriber import Subscriber
from services.verifier.taps import tensors_of
from services.verifier.thread import EngineThread

__all__ = ["Links", "NearLink"]


class NearLink(VerifierLink):
    """A link that ends where it began."""

    def __init__(
        self, address: str, offer: TapOffer, inbox: FeatureInbox, *, engine: EngineThread, limit_bytes: int
    ) -> None:
        """`address`: under which others reach the verify worker. `limit_bytes`: of features that wait to be taken."""
        super().__init__(address, offer, inbox)
        self._engine = engine
        self._limit_bytes = limit_bytes

    async def _connected(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._register()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._subscriber = Subscriber(self._engine, self._limit_bytes, self._wake)
        try:
            self._opened(self._pass_on)
            await self._broken
        finally:
            self._subscriber.end()

    async def _register(self) -> None:
        engine, tap = self._engine.engine, self.offer.tap
        self.offer.check(engine.info)
        if tap is not None and tap.tap_id not in engine.tap_ids:
            await self._engine.call(partial(engine.register_tap, tap, tensors_of(tap, self.offer.tensors)))

    def _pass_on(self, wish: Wish) -> None:
        if wish.position is None:
            self._subscriber.unsubscribe(wish.key)
        else:
            self._subscriber.subscribe(wish.key, self.offer.drafter.tap_id, wish.position)

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        try:
            while blocks := self._subscriber.take():
                for block in blocks:
                    self.receive(block)
        except Exception as error:  # noqa: BLE001 - whatever it is, the link starts over
            if not self._broken.done():
                self._broken.set_exception(error)


class Links:
    """Makes the links of a draft worker: that to the verify worker of its process needs no wire.

    Attributes:
        address: of that verify worker, once it has one.
    """

    def __init__(self, engine: EngineThread, limit_bytes: int) -> None:
        self.address = ""
        self._near = partial(NearLink, engine=engine, limit_bytes=limit_bytes)

    def connect(self, address: str, offer: TapOffer, inbox: FeatureInbox) -> VerifierLink:
        """As every `Connect`."""
        make = self._near if address == self.address else WireLink
        return make(address, offer, inbox)
