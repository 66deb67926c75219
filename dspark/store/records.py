"""Keys and record formats: the only module that knows what the store holds.

`dspark:1:workers`            set of the ids below; an id whose record has expired is removed by whoever notices
`dspark:1:worker:<worker_id>` JSON of a `WorkerRecord`, expiring `TTL_SECONDS` after its last heartbeat
`dspark:1:profile:<fingerprint>` JSON of a `CostProfile`, which does not expire

The number is the format's version: processes of different formats share a store without seeing each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import redis
import redis.asyncio
from pydantic import TypeAdapter, ValidationError
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from dspark.errors import ConfigError, StoreError
from dspark.messages import DrafterInfo, ModelInfo, WorkerLoad

__all__ = [
    "BEAT_SECONDS",
    "TTL_SECONDS",
    "Role",
    "WorkerRecord",
    "check_store",
    "open_async_client",
    "open_client",
    "shown",
]

BEAT_SECONDS = 0.5
TTL_SECONDS = 3.0
TIMEOUT_SECONDS = 1.0  # of any one store operation
WORKERS_KEY = "dspark:1:workers"

Role = Literal["draft", "verify"]


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker tells about itself.

    `model` is a verify worker's, `drafter` a draft worker's. `tap_ids` are the taps that a verify worker has
    registered. `utilization` is 0 … 1, memory in bytes, `heartbeat_at` Unix seconds on the worker's clock.
    `profile_fingerprint` names the worker's cost profile, "" where it has none.
    """

    worker_id: str
    role: Role
    address: str
    metrics_port: int = 0
    model: ModelInfo | None = None
    drafter: DrafterInfo | None = None
    load: WorkerLoad = WorkerLoad()  # noqa: RUF009 - frozen, so sharing it is safe
    tap_ids: tuple[str, ...] = ()
    page_size: int = 0
    max_step_tokens: int = 0
    utilization: float = 0.0
    memory_used: int = 0
    memory_total: int = 0
    heartbeat_at: float = 0.0
    profile_fingerprint: str = ""

    def to_json(self) -> str:
        """The stored text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerRecord:
        """The record in a stored text; fields it does not know are ignored. `ValueError` where it is none."""
        try:
            return _ADAPTER.validate_python(json.loads(text))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_ADAPTER = TypeAdapter(WorkerRecord)


def worker_key(worker_id: str) -> str:
    """Where a worker's record is."""
    return f"dspark:1:worker:{worker_id}"


def profile_key(fingerprint: str) -> str:
    """Where a cost profile is."""
    return f"dspark:1:profile:{fingerprint}"


def decode_all(texts: Iterable[str | bytes | None]) -> tuple[tuple[WorkerRecord, ...], list[str]]:
    """The records among stored texts, by id, and what is wrong with those that are none. Expired ones are None."""
    records, faults = [], []
    for text in texts:
        if text is not None:
            try:
                records.append(WorkerRecord.from_json(text))
            except ValueError as error:
                faults.append(str(error))
    return tuple(sorted(records, key=lambda record: record.worker_id)), faults


def missing(ids: Sequence[str], texts: Sequence[str | bytes | None]) -> list[str]:
    """The ids whose record has expired."""
    return [worker_id for worker_id, text in zip(ids, texts, strict=True) if text is None]


def shown(url: str) -> str:
    """The URL for messages and logs, without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def open_client(url: str) -> redis.Redis:
    """A client with short waits: a late answer is worth no more than none. `ConfigError` where `url` is no URL."""
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            decode_responses=True,
            retry=Retry(NoBackoff(), 1),  # a pooled connection may have died with the store's last restart
        )
    except ValueError as error:
        raise ConfigError(f"store {shown(url)!r} is no store URL such as redis://host:6379/0: {error}") from error


def open_async_client(url: str) -> redis.asyncio.Redis:
    """The same for an event loop."""
    try:
        return redis.asyncio.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            decode_responses=True,
            retry=AsyncRetry(NoBackoff(), 1),
        )
    except ValueError as error:
        raise ConfigError(f"store {shown(url)!r} is no store URL such as redis://host:6379/0: {error}") from error


def check_store(url: str) -> None:
    """Returns if a store answers at `url` (`redis://host:port/db`). `StoreError` or `ConfigError` names the reason."""
    with open_client(url) as client:
        try:
            client.ping()
        except redis.RedisError as error:
            raise StoreError(f"cannot reach the store at {shown(url)}: {error}") from error
