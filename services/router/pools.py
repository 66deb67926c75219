"""Keeps a link to every worker of one role that the store shows, for as long as its stream lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import grpc
import structlog

from dspark.costs import CostProfile
from dspark.errors import DSparkError
from dspark.store import Reading, Role
from services.router.links import Link
from services.router.tasks import Tasks, guarded

__all__ = ["Pool", "Workers"]

_log = structlog.get_logger(__name__)
LOOK_SECONDS = 0.2
FIRST_RETRY, LAST_RETRY = 0.2, 5.0  # seconds between two attempts at one worker
STEADY_SECONDS = 10.0  # a link that lived so long was no failure

L = TypeVar("L", bound=Link)


class Workers(Protocol):
    """Where worker records come from: `dspark.store.Directory`."""

    @property
    def age(self) -> float:
        """Seconds since the last good reading."""
        ...

    def readings(self) -> tuple[Reading, ...]:
        """The latest reading of each worker."""
        ...

    def profile(self, fingerprint: str) -> CostProfile | None:
        """The cost profile that a record names, once it has been read."""
        ...


class Pool(Generic[L]):
    """Connected workers of a role, for `async with`.

    Args:
        role: which records to follow.
        workers: the directory.
        connect: opens a link, for as long as its block runs.
        prepare: awaited with a new link before it counts; refuses by raising.
        joined: called with a link that now counts.
        left: called with a link that has ended, and why.
    """

    def __init__(
        self,
        role: Role,
        workers: Workers,
        connect: Callable[..., AbstractAsyncContextManager[L]],
        *,
        prepare: Callable[[L], Awaitable[None]],
        joined: Callable[[L], None],
        left: Callable[[L, str], None],
    ) -> None:
        self.links: dict[str, L] = {}
        self._role = role
        self._workers = workers
        self._connect = connect
        self._prepare = prepare
        self._joined = joined
        self._left = left
        self._kept: set[str] = set()
        self._readings: dict[str, Reading] = {}
        self._tasks = Tasks()

    async def __aenter__(self) -> Self:
        self._look()
        self._tasks.start(self._follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._tasks.__aexit__(kind, error, trace)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            guarded(self._look)

    def _look(self) -> None:
        self._readings = {r.record.worker_id: r for r in self._workers.readings() if r.record.role == self._role}
        for worker_id, reading in self._readings.items():
            if worker_id not in self._kept and not reading.record.load.draining:
                self._kept.add(worker_id)
                self._tasks.start(self._keep(worker_id))
        for worker_id, link in self.links.items():
            reading_ = self._readings.get(worker_id)
            link.listed = reading_ is not None
            if reading_ is not None and reading_.seen_at > link.load_at:  # replies tell more, where there are any
                link.read_load(reading_.record.load)
            if reading_ is not None:
                link.take_profile(self._workers.profile(reading_.record.profile_fingerprint))

    async def _keep(self, worker_id: str) -> None:
        """Connects, again and again while the worker is listed."""
        pause = FIRST_RETRY
        while (reading := self._readings.get(worker_id)) is not None:
            began = time.monotonic()
            reason = await self._live(reading)
            pause = FIRST_RETRY if time.monotonic() - began > STEADY_SECONDS else min(LAST_RETRY, pause * 2)
            _log.warning("worker lost", worker=worker_id, role=self._role, reason=reason, retry_seconds=pause)
            await self._rest(reading, pause)
        self._kept.discard(worker_id)

    async def _rest(self, lost: Reading, seconds: float) -> None:
        """Until it is time to try again; sooner where the worker is gone, or back at another address."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(min(LOOK_SECONDS, seconds))
            now = self._readings.get(lost.record.worker_id)
            if now is None or now.record.address != lost.record.address:
                return

    async def _live(self, reading: Reading) -> str:
        """One link's life; returns why it ended."""
        try:
            async with self._connect(reading.record) as link, self._listing(link):
                _log.info("worker joined", worker=link.worker_id, role=self._role, address=link.address)
                return await link.ended()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        except DSparkError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not lose the worker for good
            _log.exception("a link failed", worker=reading.record.worker_id)
            return f"{type(error).__name__}: {error}"

    @asynccontextmanager
    async def _listing(self, link: L) -> AsyncIterator[None]:
        if (reading := self._readings.get(link.worker_id)) is not None:
            link.take_profile(self._workers.profile(reading.record.profile_fingerprint))
        await self._prepare(link)
        self.links[link.worker_id] = link
        self._joined(link)
        try:
            yield
        finally:
            del self.links[link.worker_id]
            self._left(link, link.failure or "the stream broke")
