"""The workers as the store last told, read in the background: nothing that serves a request waits for the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import redis
import structlog

from dspark.costs import CostProfile
from dspark.ending import end
from dspark.errors import StoreError
from dspark.store.records import (
    WORKERS_KEY,
    WorkerRecord,
    decode_all,
    missing,
    open_async_client,
    profile_key,
    shown,
    worker_key,
)

__all__ = ["Directory", "Reading"]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reading:
    """A worker's record, and `seen_at`: `time.monotonic()` here when this heartbeat of it was first seen."""

    record: WorkerRecord
    seen_at: float

    @property
    def age(self) -> float:
        """Seconds since this heartbeat was first seen."""
        return time.monotonic() - self.seen_at


class Directory:
    """A background reader, for `async with`. `StoreError` at the start if the store cannot be reached.

    While the store is away the last good reading stays, `age` grows, and streams go on. What is read is only for
    placing new work: a worker missing here may still serve what it has.
    """

    def __init__(self, url: str, *, interval: float = 0.25) -> None:
        self._url = url
        self._interval = interval
        self._readings: dict[str, Reading] = {}
        self._profiles: dict[str, CostProfile] = {}
        self._unreadable: set[str] = set()
        self._read_at = time.monotonic()
        self._changed = asyncio.Condition()
        self._reachable = True
        self._faults: list[str] = []

    async def __aenter__(self) -> Self:
        self._client = open_async_client(self._url)
        try:
            await self._read()
        except redis.RedisError as error:
            raise StoreError(f"cannot reach the store at {shown(self._url)}: {error}") from error
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(self._task)
        await self._client.aclose()

    def workers(self) -> tuple[WorkerRecord, ...]:
        """The records of the last good reading, by worker id."""
        return tuple(reading.record for reading in self._readings.values())

    def readings(self) -> tuple[Reading, ...]:
        """The same, with their ages."""
        return tuple(self._readings.values())

    def profile(self, fingerprint: str) -> CostProfile | None:
        """A cost profile that some worker's record named; each is read once. None where it is not there (yet)."""
        return self._profiles.get(fingerprint)

    @property
    def age(self) -> float:
        """Seconds since the last good reading."""
        return time.monotonic() - self._read_at

    async def wait_for(self, condition: Callable[[tuple[WorkerRecord, ...]], bool]) -> tuple[WorkerRecord, ...]:
        """The first reading, the present one included, that meets the condition. For starting up, not for serving."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self.workers()))
            return self.workers()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self._read()
            except redis.RedisError as error:
                self._note(reachable=False, reason=str(error))
            except Exception as error:  # noqa: BLE001 - were the task to end here, no worker would ever be seen again
                self._note(reachable=False, reason=f"{type(error).__name__}: {error}")
            else:
                self._note(reachable=True)

    async def _read(self) -> None:
        ids = sorted(str(worker_id) for worker_id in await self._client.smembers(WORKERS_KEY))
        texts = await self._client.mget([worker_key(worker_id) for worker_id in ids]) if ids else []
        if gone := missing(ids, texts):
            await self._client.srem(WORKERS_KEY, *gone)
        records, faults = decode_all(texts)
        if faults and faults != self._faults:
            _log.warning("worker records that cannot be read", reasons=faults)
        self._faults = faults
        await self._read_profiles(records)
        await self._take(records)

    async def _read_profiles(self, records: tuple[WorkerRecord, ...]) -> None:
        """Those that are named and not known yet."""
        named = {record.profile_fingerprint for record in records} - {""}
        unknown = sorted(named - self._profiles.keys() - self._unreadable)
        texts = await self._client.mget([profile_key(name) for name in unknown]) if unknown else []
        for fingerprint, text in zip(unknown, texts, strict=True):
            if text is not None:
                self._keep_profile(fingerprint, text)

    def _keep_profile(self, fingerprint: str, text: str | bytes) -> None:
        try:
            self._profiles[fingerprint] = CostProfile.from_json(text)
        except ValueError as error:
            self._unreadable.add(fingerprint)
            _log.warning("a cost profile that cannot be read", fingerprint=fingerprint, reason=str(error))

    async def _take(self, records: tuple[WorkerRecord, ...]) -> None:
        now = self._read_at = time.monotonic()
        fresh = {}
        for record in records:
            known = self._readings.get(record.worker_id)
            same = known is not None and known.record.heartbeat_at == record.heartbeat_at
            fresh[record.worker_id] = known if known is not None and same else Reading(record, now)
        self._readings = fresh
        async with self._changed:
            self._changed.notify_all()

    def _note(self, *, reachable: bool, reason: str = "") -> None:
        if reachable != self._reachable:
            self._reachable = reachable
            if reachable:
                _log.info("the store is back", store=shown(self._url))
            else:
                _log.warning("the store does not answer", store=shown(self._url), reason=reason)
