"""The program itself: starts against a real store, is ready, drains on a signal, fails with one line."""

import asyncio
import json
import os
import re
import signal
import sys
from typing import Any

import pytest
from support.toys import ToyDraft, ToyVerifier, expected, ids_of, letters

from dspark.rpc.channel import connect
from dspark.rpc.server import serve
from dspark.store import EmbeddedStore, Heartbeat
from dspark.v1 import draft_pb2_grpc, generation_pb2, generation_pb2_grpc, verifier_pb2_grpc


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.router", *arguments,
        stderr=asyncio.subprocess.PIPE, env=os.environ | {"DSPARK_LOG_LEVEL": "info"},
    )  # fmt: skip


async def event(process: asyncio.subprocess.Process, name: str) -> dict[str, Any]:
    assert process.stderr is not None
    async with asyncio.timeout(20):
        while line := await process.stderr.readline():
            if line.startswith(b"{") and (entry := json.loads(line))["event"] == name:
                return dict(entry)
    raise AssertionError(f"no event {name!r}")


async def generate(stub: Any, tokens: int) -> list[int]:
    request = generation_pb2.GenerateRequest(text="hello", max_tokens=tokens, request_id="mine")
    request.sampling.seed = 3
    return [token async for response in stub.Generate(request) for token in response.delta.token_ids]


async def test_it_serves_workers_from_a_real_store_and_drains_on_sigterm() -> None:
    verifier, drafter = ToyVerifier(), ToyDraft()
    verifier.delay = 0.002
    add_v = (verifier_pb2_grpc.add_VerifierServicer_to_server, verifier, "dspark.v1.Verifier")
    add_d = (draft_pb2_grpc.add_DraftServicer_to_server, drafter, "dspark.v1.Draft")
    async with EmbeddedStore() as url, serve("127.0.0.1:0", [add_v]) as v, serve("127.0.0.1:0", [add_d]) as d:
        verifier.server, drafter.server = v, d
        with Heartbeat(url, verifier.record), Heartbeat(url, drafter.record):
            process = await start("--store", url, "--listen", "127.0.0.1:0", "--policy", "fixed:3")
            ready = await event(process, "ready")
            async with connect(ready["address"]) as channel:
                stub = generation_pb2_grpc.RouterStub(channel)
                running = asyncio.create_task(generate(stub, 300))
                accepted = await event(process, "accepted")
                first = await event(process, "first token")
                process.send_signal(signal.SIGTERM)
                assert await running == expected(letters, [0, *ids_of("hello")], 3, 300)
                done = await event(process, "finished")
            assert await process.wait() == 0
    assert accepted["request_id"] == first["request_id"] == done["request_id"] == "mine"
    assert accepted["service"] == "router"
    assert 0 < done["accepted"] < done["verified"]


async def test_adaptive_without_costs_is_refused_with_the_command_that_makes_them() -> None:
    verifier = ToyVerifier()
    add = (verifier_pb2_grpc.add_VerifierServicer_to_server, verifier, "dspark.v1.Verifier")
    async with EmbeddedStore() as url, serve("127.0.0.1:0", [add]) as server:
        verifier.server = server
        with Heartbeat(url, verifier.record):
            process = await start("--store", url, "--listen", "127.0.0.1:0", "--policy", "adaptive")
            _, stderr = await process.communicate()
    assert process.returncode == 1
    last = stderr.decode().strip().splitlines()[-1]
    assert "verify-0 has no cost profile" in last
    assert "`dspark profile`" in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--store"),
        (("--store", "redis://127.0.0.1:1"), "cannot reach the store"),
        (("--store", "nonsense"), "nonsense"),
        (("--store", "redis://127.0.0.1:1", "--policy", "best"), "policy 'best': known are none"),
        (("--store", "redis://127.0.0.1:1", "--max-queue", "0"), "--max-queue"),
    ],
)
async def test_it_fails_with_one_readable_line(arguments: tuple[str, ...], words: str) -> None:
    process = await start(*arguments)
    _, stderr = await process.communicate()
    assert process.returncode == 1
    lines = stderr.decode().strip().splitlines()
    assert len(lines) == 1
    assert re.match(r"dspark router: ", lines[0])
    assert words in lines[0]
