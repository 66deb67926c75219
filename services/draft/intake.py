"""Where features come from: one link to every verify worker whose target fits, and who wants what from which.

Verify workers of the store's directory are connected ahead of need; one that a router names before the directory has
shown it is connected on demand.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from dspark.ending import end
from dspark.errors import InvalidRequest
from dspark.messages import SequenceKey
from services.draft.inbox import FeatureInbox
from services.draft.link import Connect, VerifierLink
from services.draft.offer import TapOffer
from services.draft.wire import WireLink

__all__ = ["FeatureIntake"]

_FOLLOW_SECONDS = 0.5


class FeatureIntake:
    """For `async with`. Sequences subscribed here have their features fed to the inbox."""

    def __init__(
        self,
        offer: TapOffer,
        inbox: FeatureInbox,
        *,
        present: Callable[[], Iterable[str]] = tuple,
        connect_seconds: float = 5.0,
        linger_seconds: float = 30.0,
        connect: Connect = WireLink,
    ) -> None:
        """`present`: addresses of the verify workers to be connected to, as far as is known now.

        `connect_seconds` bounds a subscription's wait for its link; a link to a worker that is not present any more is
        kept for `linger_seconds` after the last sequence.
        """
        self._offer = offer
        self._inbox = inbox
        self._present = present
        self._connect_seconds = connect_seconds
        self._linger_seconds = linger_seconds
        self._connect = connect
        self._links: dict[str, VerifierLink] = {}
        self._sources: dict[SequenceKey, VerifierLink] = {}
        self._resources = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._follower = asyncio.create_task(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(self._follower)
        for link in self._links.values():
            await link.__aexit__(None, None, None)
        self._links.clear()

    @property
    def connected(self) -> int:
        """Verify workers that features can come from now."""
        return sum(link.connected for link in self._links.values())

    async def subscribe(self, key: SequenceKey, address: str) -> None:
        """Have a sequence's features sent by the verify worker at `address`, from what the inbox lacks on.

        Raises `Mismatch` where the drafter does not fit its target, `Unavailable` where it cannot be reached,
        `InvalidRequest` for what is no address.
        """
        if not address.rpartition(":")[2].isdecimal():
            raise InvalidRequest(f"verifier_address {address!r} is not host:port")
        link = self._sources[key] = await self._link(address)
        link.want(key)
        try:
            await link.ready(self._connect_seconds)
        except BaseException:
            self.unsubscribe(key)
            raise

    def unsubscribe(self, key: SequenceKey) -> None:
        """Stop a sequence's features."""
        link = self._sources.pop(key, None)
        if link is not None:
            link.drop(key)

    def pull(self, key: SequenceKey) -> None:
        """Features of this sequence are missing: ask for them again."""
        link = self._sources.get(key)
        if link is not None:
            link.pull(key)

    async def _link(self, address: str) -> VerifierLink:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = self._connect(address, self._offer, self._inbox)
            await link.__aenter__()
        return link

    async def _follow(self) -> None:
        """Connect to verify workers that come, leave those that are gone and no longer needed."""
        while True:
            present = set(self._present())
            for address in present:
                await self._link(address)
            for address in [a for a in self._links if a not in present and self._unneeded(a)]:
                await self._links.pop(address).__aexit__(None, None, None)
            await asyncio.sleep(_FOLLOW_SECONDS)

    def _unneeded(self, address: str) -> bool:
        return self._links[address].idle_seconds > self._linger_seconds
