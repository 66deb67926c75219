"""Records, heartbeats and the directory against a real embedded server."""

import asyncio
import json
import math
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import redis
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from dspark.costs import CostProfile, Point
from dspark.errors import ConfigError, StoreError
from dspark.messages import DrafterInfo, ModelInfo, WorkerLoad
from dspark.store import Directory, EmbeddedStore, Heartbeat, WorkerRecord, check_store, cpu_usage, gpu_usage
from dspark.store.embedded import _free_port
from dspark.store.records import shown

MODEL = ModelInfo("m", "gemma3", "f", "n", 512, 64, 4, 2048, (1, 106), 2)
DRAFTER = DrafterInfo("d", "dspark", "f", "t", "f", 512, 128, 5)
RECORD = WorkerRecord("v1", "verify", "127.0.0.1:5", 9000, MODEL, load=WorkerLoad(running=2, free_pages=3))


@pytest.fixture
async def store() -> AsyncIterator[str]:
    async with EmbeddedStore() as url:
        yield url


PROFILE = CostProfile("verify", "abc", (Point(1, 64, 0.5), Point(8, 64, 0.9)), 1.5)


def test_record_round_trip() -> None:
    full = replace(
        RECORD, drafter=DRAFTER, tap_ids=("a", "b"), utilization=0.5, heartbeat_at=1.5, profile_fingerprint="abc"
    )
    assert WorkerRecord.from_json(full.to_json()) == full
    assert WorkerRecord.from_json(RECORD.to_json().replace("{", '{"later_field": 1, ', 1)) == RECORD


def test_records_of_earlier_workers_are_read() -> None:
    fields = json.loads(RECORD.to_json())
    del fields["profile_fingerprint"], fields["load"]["observed_ratio"]
    assert WorkerRecord.from_json(json.dumps(fields)) == RECORD


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


# ---------------------------------------------------------------- cost profiles


async def until_known(directory: Directory, fingerprint: str) -> CostProfile:
    async with asyncio.timeout(3):
        while (found := directory.profile(fingerprint)) is None:
            await asyncio.sleep(0.01)
    return found


async def test_a_profile_is_published_and_read_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = replace(RECORD, profile_fingerprint="abc")
    read: list[list[str]] = []
    mget = redis.asyncio.Redis.mget

    async def spied(client: redis.asyncio.Redis, keys: list[str]) -> Any:
        read.append([key for key in keys if "profile" in key])
        return await mget(client, keys)

    monkeypatch.setattr(redis.asyncio.Redis, "mget", spied)
    async with Directory(store, interval=0.02) as directory:
        assert directory.profile("abc") is None
        with Heartbeat(store, lambda: named, interval=0.05, profile=PROFILE):
            assert await until_known(directory, "abc") == PROFILE
            count = len(read)
            while len(read) < count + 5:
                await asyncio.sleep(0.01)
        assert [keys for keys in read if keys] == [["dspark:1:profile:abc"]]
        async with asyncio.timeout(2):
            await directory.wait_for(lambda workers: not workers)
        assert directory.profile("abc") == PROFILE
    async with redis.asyncio.Redis.from_url(store) as client:
        assert await client.ttl("dspark:1:profile:abc") == -1  # stays, and does not expire


async def test_a_new_measurement_takes_the_old_ones_place_and_an_emptied_store_gets_it_again(store: str) -> None:
    newer = replace(PROFILE, made_at=2.5)
    named = replace(RECORD, profile_fingerprint="abc")
    async with redis.asyncio.Redis.from_url(store) as client:
        await client.set("dspark:1:profile:abc", PROFILE.to_json())
        with Heartbeat(store, lambda: named, interval=0.05, profile=newer):
            assert await client.get("dspark:1:profile:abc") == newer.to_json().encode()
            await client.flushall()
            async with Directory(store, interval=0.02) as directory:
                assert await until_known(directory, "abc") == newer


async def test_a_profile_that_comes_later_or_is_broken_hides_no_worker(store: str) -> None:
    async with redis.asyncio.Redis.from_url(store) as client, Directory(store, interval=0.02) as directory:
        broken = replace(RECORD, worker_id="v2", profile_fingerprint="bad")
        await client.set("dspark:1:profile:bad", "{}")
        with (
            Heartbeat(store, lambda: replace(RECORD, profile_fingerprint="late")),
            Heartbeat(store, lambda: broken),
        ):
            async with asyncio.timeout(2):
                await directory.wait_for(lambda workers: len(workers) == 2)
            assert directory.profile("late") is directory.profile("bad") is None
            await client.set("dspark:1:profile:late", replace(PROFILE, fingerprint="late").to_json())
            assert (await until_known(directory, "late")).points == PROFILE.points
            assert directory.profile("bad") is None


# ---------------------------------------------------------------- usage


def test_cpu_usage_is_this_process_by_all_its_cores() -> None:
    read = cpu_usage()
    began = time.process_time(), time.perf_counter()
    while time.process_time() - began[0] < 0.3:
        sum(range(10_000))
    busy = (time.process_time() - began[0]) / (time.perf_counter() - began[1])
    usage = read()
    assert usage.utilization == pytest.approx(busy / len(os.sched_getaffinity(0)), rel=0.2)
    time.sleep(0.3)
    assert read().utilization < 0.2
    assert usage.memory_used == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert usage.memory_total == psutil.virtual_memory().total


class FakeNvml(SimpleNamespace):
    """Two cards; the second is busy."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        try:
            return ["GPU-a", "GPU-b"].index(uuid)
        except ValueError:
            raise self.NVMLError("Not Found") from None

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(handle + 1) << 30, total=80 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=(3, 97)[handle], memory=50)


def test_gpu_usage_is_the_card_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert (gpu_usage("GPU-b")().utilization, gpu_usage("GPU-a")().utilization) == (0.97, 0.03)
    assert gpu_usage("GPU-b")().memory_used == 2 << 30
    assert gpu_usage("GPU-b")().memory_total == 80 << 30
    with pytest.raises(ConfigError, match="GPU GPU-c: Not Found"):
        gpu_usage("GPU-c")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match="nvidia-ml-py"):
        gpu_usage("GPU-a")


async def test_directory_ends_in_the_middle_of_a_reading() -> None:
    async with EmbeddedStore() as url:
        for number in range(12):
            async with asyncio.timeout(20), Directory(url, interval=0.0) as directory:
                await asyncio.sleep(0.0005 * number)
            assert directory._task.done()
