"""Every program in docs/client.md that asks a router runs as it stands, but for the address."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from support.scripted_router import ScriptedRouter, running

DOCS = Path(__file__).parents[2] / "docs" / "client.md"
ADDRESS = "127.0.0.1:50051"
PROGRAMS = [p for p in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE) if ADDRESS in p]


def test_there_are_programs() -> None:
    assert len(PROGRAMS) == 4


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
async def test_a_program_of_the_docs_runs(number: int) -> None:
    await _runs(PROGRAMS[number])


async def test_nothing_of_grpc_is_left_running_behind_a_blocking_client() -> None:
    """Its poller, were it alive as the program ends, might keep it from ending."""
    program = f"""
import threading
from dspark.client import SyncClient
client = SyncClient("{ADDRESS}")
with client:
    print(client.complete("hello").text)
    assert any("poll" in thread.name for thread in threading.enumerate())
left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
assert not left, left
"""
    await _runs(program)


async def _runs(program: str) -> None:
    async with running(ScriptedRouter()) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", program.replace(ADDRESS, f"127.0.0.1:{server.port}"),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    assert "Hi" in out.decode()
