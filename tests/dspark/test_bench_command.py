"""`dspark bench` as a user runs it: wrong usage, and a run that is stopped."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.scripted_router import ScriptedRouter, running

from dspark.v1 import generation_pb2 as pb


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from dspark.cli import main; main()",
        "bench",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )


async def finished(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"prompt {n}"]}) + "\n" for n in range(5)))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--policy", "fast"), 2, "policy 'fast' is none of none, fixed:N"),
        (("--policy", ""), 2, "no policy is named"),
        (("--concurrency", "0"), 2, "concurrency '0' is no whole number"),
        (("--concurrency", "1,x"), 2, "concurrency 'x'"),
        (("--requests", "0"), 2, "--requests"),
        (("--json", "/nowhere/at/all.json"), 1, "there is no directory /nowhere/at"),
        (("--plots", "/dev/null/pictures"), 1, "--plots /dev/null/pictures"),
    ],
)
async def test_wrong_usage(arguments: tuple[str, ...], status: int, words: str, prompts: str) -> None:
    code, out, err = await finished(await start("--prompts", prompts, "--router", "127.0.0.1:9", *arguments))
    assert (code, out) == (status, "")
    assert words in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


async def test_help() -> None:
    code, out, err = await finished(await start("--help"))
    assert code == 0, err
    assert "Usage: dspark bench" in out


async def test_prompts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    code, _, err = await finished(await start("--prompts", str(tmp_path / "empty"), "--router", "127.0.0.1:9"))
    assert (code, err.strip()) == (1, f"error: {tmp_path / 'empty'} has no prompts")


class Endless(ScriptedRouter):
    """Answers for a while, then not at all."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if len(self.requests) > 18:
            self.requests.append(request)
            await asyncio.sleep(600)
        async for response in super().Generate(request, context):
            yield response


async def test_a_run_that_is_stopped_says_what_it_has(prompts: str, tmp_path: Path) -> None:
    router, path = Endless(), tmp_path / "report.json"
    async with running(router) as server:
        process = await start(
            *("--prompts", prompts, "--router", f"127.0.0.1:{server.port}", "--json", str(path)),
            *("--policy", "none,fixed:9", "--concurrency", "1", "--requests", "2", "--repeats", "5"),
        )
        while len(router.requests) < 20:
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code, out, err = await finished(process)
    assert code == 128 + signal.SIGINT
    assert "(not complete)" in out
    assert "fixed:9" in out
    assert "this router verifies at most 4" in err
    assert "prompt tokens came from a prefix cache" in err
    facts = json.loads(path.read_text())
    assert facts["complete"] is False
    assert 2 <= len(facts["cells"]) < 10
    assert facts["served"]["workers"] == {"verify": 1}
