"""Records, heartbeats and the directory against a real embedded server."""

import asyncio
import math
import os
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ConfigError, StoreError
from dspark.messages import DrafterInfo, ModelInfo, WorkerLoad
from dspark.store import Directory, EmbeddedStore, Heartbeat, WorkerRecord, check_store, cpu_usage
from dspark.store.embedded import _free_port
from dspark.store.records import shown

MODEL = ModelInfo("m", "gemma3", "f", "n", 512, 64, 4, 2048, (1, 106), 2)
DRAFTER = DrafterInfo("d", "dspark", "f", "t", "f", 512, 128, 5)
RECORD = WorkerRecord("v1", "verify", "127.0.0.1:5", 9000, MODEL, load=WorkerLoad(running=2, free_pages=3))


@pytest.fixture
async def store() -> AsyncIterator[str]:
    async with EmbeddedStore() as url:
        yield url


def test_record_round_trip() -> None:
    full = replace(RECORD, drafter=DRAFTER, tap_ids=("a", "b"), utilization=0.5, heartbeat_at=1.5)
    assert WorkerRecord.from_json(full.to_json()) == full
    assert WorkerRecord.from_json(RECORD.to_json().replace("{", '{"later_field": 1, ', 1)) == RECORD


@given(st.text(max_size=8), st.floats(), st.booleans())
def test_record_round_trip_of_any_text_and_number(name: str, seconds: float, draining: bool) -> None:
    record = replace(RECORD, worker_id=name, load=WorkerLoad(step_seconds=seconds, draining=draining))
    back = WorkerRecord.from_json(record.to_json())
    assert back == record or math.isnan(seconds)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"worker_id": "x", "role": "other", "address": ""}'])
def test_what_is_no_record_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        WorkerRecord.from_json(text)


async def test_a_worker_appears_changes_drains_and_leaves(store: str) -> None:
    load = WorkerLoad(running=1)
    async with Directory(store, interval=0.02) as directory:
        assert directory.workers() == ()
        with Heartbeat(store, lambda: replace(RECORD, load=load)) as heartbeat:
            async with asyncio.timeout(2):
                (seen,) = await directory.wait_for(lambda workers: len(workers) == 1)
                assert seen.model == MODEL
                assert seen.memory_total > seen.memory_used > 0
                assert abs(seen.heartbeat_at - time.time()) < 2
                load = WorkerLoad(draining=True)
                heartbeat.beat()
                await directory.wait_for(lambda workers: workers[0].load.draining)
        async with asyncio.timeout(1):
            await directory.wait_for(lambda workers: not workers)


async def test_a_silent_worker_expires(store: str) -> None:
    async with redis.asyncio.Redis.from_url(store) as client, Directory(store, interval=0.02) as directory:
        await client.set("dspark:1:worker:w", RECORD.to_json(), px=200)
        await client.sadd("dspark:1:workers", "w")
        async with asyncio.timeout(2):
            await directory.wait_for(lambda workers: len(workers) == 1)
            await asyncio.sleep(0.1)
            (reading,) = directory.readings()
            assert 0.05 < reading.age < 0.3
            await directory.wait_for(lambda workers: not workers)
        assert await client.scard("dspark:1:workers") == 0


async def test_an_emptied_store_fills_again(store: str) -> None:
    async with redis.asyncio.Redis.from_url(store) as client, Directory(store, interval=0.02) as directory:
        with Heartbeat(store, lambda: RECORD, interval=0.2):
            async with asyncio.timeout(3):
                await directory.wait_for(lambda workers: len(workers) == 1)
                await client.flushall()
                await directory.wait_for(lambda workers: not workers)
                await directory.wait_for(lambda workers: len(workers) == 1)
            assert [record.worker_id for record in directory.workers()] == [RECORD.worker_id]


async def test_a_restarted_store_fills_again_and_the_last_reading_stays_meanwhile() -> None:
    port = _free_port()
    async with EmbeddedStore(port=port) as url:
        heartbeat = Heartbeat(url, lambda: RECORD, interval=0.1)
        heartbeat.__enter__()
        directory = await Directory(url, interval=0.02).__aenter__()
    try:
        await asyncio.sleep(0.3)
        assert [record.worker_id for record in directory.workers()] == ["v1"]
        assert directory.age > 0.2
        last = directory.workers()[0].heartbeat_at
        async with EmbeddedStore(port=port), asyncio.timeout(3):
            await directory.wait_for(lambda workers: any(worker.heartbeat_at > last for worker in workers))
            assert directory.age < 0.2
    finally:
        heartbeat.close()
        await directory.__aexit__(None, None, None)


async def test_a_broken_record_hides_no_other(store: str) -> None:
    async with redis.asyncio.Redis.from_url(store) as client:
        await client.set("dspark:1:worker:bad", "{}")
        await client.sadd("dspark:1:workers", "bad")
        with Heartbeat(store, lambda: RECORD):
            async with Directory(store) as directory:
                assert [record.worker_id for record in directory.workers()] == ["v1"]


async def test_a_record_that_cannot_be_made_is_tried_again(store: str) -> None:
    failing = False

    def make() -> WorkerRecord:
        if failing:
            raise RuntimeError("not now")
        return RECORD

    async with Directory(store, interval=0.02) as directory:
        with Heartbeat(store, make, interval=0.02, ttl=0.2):
            failing = True
            async with asyncio.timeout(2):
                await directory.wait_for(lambda workers: not workers)
                failing = False
                await directory.wait_for(lambda workers: len(workers) == 1)


async def test_an_unreachable_store_is_a_readable_error() -> None:
    with pytest.raises(StoreError, match=r"cannot reach the store at redis://127\.0\.0\.1:1"):
        check_store("redis://127.0.0.1:1")
    with pytest.raises(StoreError, match="cannot reach the store"):
        Heartbeat("redis://127.0.0.1:1", lambda: RECORD).__enter__()
    with pytest.raises(StoreError, match="cannot reach the store"):
        await Directory("redis://127.0.0.1:1").__aenter__()
    with pytest.raises(ConfigError, match="no store URL"):
        check_store("somewhere")


def test_passwords_are_not_shown() -> None:
    assert shown("redis://user:secret@host:1/0") == "redis://user:***@host:1/0"
    assert shown("redis://host:1/0") == "redis://host:1/0"


async def test_the_embedded_server_is_gone_afterwards() -> None:
    embedded = EmbeddedStore()
    async with embedded as url:
        check_store(url)
        process = psutil.Process(embedded.pid)
        assert os.getpgid(embedded.pid) == embedded.pid
    assert not process.is_running()


async def test_the_embedded_server_that_died_says_why() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(StoreError, match=r"did not start: .*Failed listening on port"):
            await EmbeddedStore(port=taken.getsockname()[1]).__aenter__()


def test_cpu_usage() -> None:
    read = cpu_usage()
    sum(range(2_000_000))
    usage = read()
    assert 0 <= usage.utilization <= 1
    assert usage.memory_total > usage.memory_used > 0
