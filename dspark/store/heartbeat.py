"""Keeps a worker's record alive from a thread of its own, so that no long step lets it expire."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import redis
import structlog

from dspark.costs import CostProfile
from dspark.store.records import (
    BEAT_SECONDS,
    TTL_SECONDS,
    WORKERS_KEY,
    WorkerRecord,
    check_store,
    open_client,
    profile_key,
    shown,
    worker_key,
)
from dspark.store.usage import Usage, cpu_usage

__all__ = ["Heartbeat"]

_log = structlog.get_logger(__name__)


class Heartbeat:
    """Writes `make_record()` every 0.5 s, for `with`; the record goes when the block is left.

    `make_record` is called in the heartbeat's thread and must not block; the heartbeat fills in utilization, memory
    and time. A store that is away, emptied or restarted is no error: the record is back with the next beat that
    reaches it. Only at the start an unreachable store raises `StoreError`. A `profile` is written at the start, in the
    place of an older one of its fingerprint, and again whenever the store has lost it; it stays when the worker goes.
    """

    def __init__(
        self,
        url: str,
        make_record: Callable[[], WorkerRecord],
        *,
        usage: Callable[[], Usage] | None = None,
        profile: CostProfile | None = None,
        interval: float = BEAT_SECONDS,
        ttl: float = TTL_SECONDS,
    ) -> None:
        self._url = url
        self._make_record = make_record
        self._usage = usage or cpu_usage()
        self._profile = profile
        self._interval = interval
        self._ttl = ttl
        self._wake = threading.Event()
        self._stopping = False
        self._reachable = True
        self._worker_id = ""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        check_store(self._url)
        self._client = open_client(self._url)
        self._publish()
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def beat(self) -> None:
        """Writes the record soon instead of at the next interval: after a change that routers should see."""
        self._wake.set()

    def close(self) -> None:
        """Stops beating and deletes the record. Idempotent."""
        if self._stopping:
            return
        self._stopping = True
        self._wake.set()
        self._thread.join()
        with contextlib.suppress(redis.RedisError):
            self._client.delete(worker_key(self._worker_id))
            self._client.srem(WORKERS_KEY, self._worker_id)
        self._client.close()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._interval)
            self._wake.clear()
            if not self._stopping:
                self._beat()

    def _beat(self) -> None:
        try:
            self._write(self._record())
        except redis.RedisError as error:
            self._note(reachable=False, reason=str(error))
        except Exception:  # noqa: BLE001 - a thread that ended here would make a healthy worker vanish
            _log.exception("could not make the worker's record")
        else:
            self._note(reachable=True)

    def _record(self) -> WorkerRecord:
        record, usage = self._make_record(), self._usage()
        self._worker_id = record.worker_id
        return dataclasses.replace(record, **dataclasses.asdict(usage), heartbeat_at=time.time())

    def _write(self, record: WorkerRecord) -> None:
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.set(worker_key(record.worker_id), record.to_json(), px=round(self._ttl * 1000))
            pipeline.sadd(WORKERS_KEY, record.worker_id)
            pipeline.exists(profile_key(record.profile_fingerprint))
            *_, known = pipeline.execute()
        if not known:
            self._publish()

    def _publish(self) -> None:
        if self._profile is not None:
            self._client.set(profile_key(self._profile.fingerprint), self._profile.to_json())

    def _note(self, *, reachable: bool, reason: str = "") -> None:
        if reachable != self._reachable:
            self._reachable = reachable
            if reachable:
                _log.info("the store is back", store=shown(self._url))
            else:
                _log.warning("the store does not answer", store=shown(self._url), reason=reason)
