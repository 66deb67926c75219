"""The command line as a user runs it, in processes of its own."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.scripted_router import ScriptedRouter, running

from dspark import __version__


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


async def dspark(*arguments: str, stdin: str = "", **environment: str) -> Done:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from dspark.cli import main; main()",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


@pytest.fixture
async def router() -> AsyncIterator[str]:
    async with running(ScriptedRouter()) as server:
        yield f"127.0.0.1:{server.port}"


def one_line(done: Done) -> str:
    assert done.status == 1
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1
    return done.err


async def test_version() -> None:
    done = await dspark("--version")
    assert (done.status, done.out) == (0, f"dspark {__version__}\n")


@pytest.mark.parametrize("command", ["up", "generate", "chat", "demo", "evaluate", "propose", "profile", "models"])
async def test_every_command_explains_itself(command: str) -> None:
    done = await dspark(command, "--help")
    assert done.status == 0, done.err
    assert "Usage: dspark" in done.out
    assert command in done.out


async def test_the_help_lists_every_command() -> None:
    done = await dspark("--help")
    assert done.status == 0, done.err
    assert all(
        name in done.out for name in ("up", "generate", "chat", "demo", "evaluate", "propose", "profile", "models")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("generate",),
        ("generate", "x", "--temperature", "hot"),
        ("evaluate",),
        ("generate", "x", "--mode", "y"),
    ],
)
async def test_wrong_usage_is_exit_status_2(arguments: tuple[str, ...]) -> None:
    done = await dspark(*arguments)
    assert done.status == 2
    assert "Traceback" not in done.err


async def test_the_command_line_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from dspark.cli import main; main(['generate', '--help'])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


async def test_generate_streams_and_sums_up(router: str) -> None:
    done = await dspark("generate", "hello", "--router", router)
    assert done.status == 0, done.err
    assert done.out == "Hi!\n"
    assert "3 tokens (stop)" in done.err
    assert "τ 1.50" in done.err
    assert "1 of 4 verified drafts accepted" in done.err


async def test_generate_as_json_with_the_plain_run_beside_it(router: str) -> None:
    done = await dspark("generate", "-", "--json", "--compare-plain", stdin="hello", DSPARK_ROUTER=router)
    assert done.status == 0, done.err
    facts = json.loads(done.out)
    assert (facts["text"], facts["token_ids"], facts["same_tokens"]) == ("Hi!", [7, 8, 9], True)
    assert facts["speculation"]["tau"] == 1.5
    assert facts["plain"]["text"] == "Hi!"


async def test_generate_compares_in_a_table(router: str) -> None:
    done = await dspark("generate", "hello", "--router", router, "--compare-plain")
    assert done.status == 0, done.err
    assert "Token ids: the same" in done.err


async def test_failures_are_one_line(router: str, tmp_path: Path) -> None:
    assert "error: queue is full (2) (try again in 0.25 s)" in one_line(
        await dspark("generate", "full", "--router", router)
    )
    assert "router 127.0.0.1:1: " in one_line(await dspark("generate", "hello", "--router", "127.0.0.1:1"))
    assert "top_k is -1" in one_line(await dspark("generate", "hello", "--top-k", "-1", "--router", router))
    missing = await dspark("evaluate", "--prompts", str(tmp_path / "none.jsonl"), "--router", router)
    assert "none.jsonl" in one_line(missing)
    missing = await dspark("generate", "hello", "--model", str(tmp_path / "no-model"))
    assert "no-model" in one_line(missing)


async def test_chat_needs_a_template(router: str) -> None:
    done = await dspark("chat", "--router", router)
    assert "has no chat template" in one_line(done)


async def test_evaluate_reports_and_writes_json(router: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["a", "b"]}\n\n{"turns": ["c"]}\n{"turns": ["d"]}\n')
    done = await dspark(
        "evaluate", "--prompts", str(prompts), "--limit", "2", "--router", router, "--concurrency", "2", "--json",
        str(tmp_path / "out.json"), "--temperature", "0", "--seed", "5", "--mode", "rejection", "--template", "qa",
    )  # fmt: skip
    assert done.status == 0, done.err
    figures = json.loads((tmp_path / "out.json").read_text())
    expected = {
        "tau": 1.5,
        "conditional_acceptance": [0.5, 0.0],
        "drafted": 12,
        "verified": 8,
        "accepted": 2,
        "rejected": 6,
        "rounds": 4,
        "tokens": 6,
        "tokens_per_second_per_stream": 2.0,
        "compared": 0,
        "equal": 0,
        "seed": 5,
        "mode": "rejection",
        "temperature": 0.0,
        "model": "m",
        "drafter": "d",
    }
    assert {name: figures[name] for name in expected} == expected
    assert figures["tokens_per_second"] > 0
    assert "accepted length" in done.out


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": []}', '{"turns": [3]}', '{"prompt": "x"}'])
async def test_evaluate_names_the_line_that_is_no_prompt(router: str, tmp_path: Path, line: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["a"]}\n' + line + "\n")
    done = await dspark("evaluate", "--prompts", str(prompts), "--router", router)
    assert "prompts.jsonl:2" in one_line(done)


async def test_comparing_a_mode_that_draws_anew_is_refused(router: str, tmp_path: Path) -> None:
    done = await dspark(
        "evaluate", "--prompts", str(tmp_path), "--router", router, "--compare", "reference", "--mode", "rejection"
    )
    assert done.status == 2
    assert "rejection mode draws anew" in done.err
