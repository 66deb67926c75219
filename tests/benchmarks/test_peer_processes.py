"""Peers as processes: the line protocol, resting between turns, and every way in which one may fail."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.peering.peer import Peer, find_python
from benchmarks.peering.workload import Work
from dspark.errors import ConfigError, StartupError, Unavailable

SCRIPT = Path(__file__).parent / "tiny_peer.py"
WORK = Work(prompts=((5, 7), (1,)), streams=2, temperature=0.0, max_tokens=3, seed=4)


def peer(tmp_path: Path, fault: str = "", **settings: Any) -> Peer:
    command = [sys.executable, str(SCRIPT), *([fault] if fault else [])]
    return Peer("tiny", command, {"model": "m", "threads": 2}, tmp_path / "tiny.log", **settings)


async def becomes(process: psutil.Process, *states: str) -> bool:
    """A signal arrives a moment after it was sent."""
    for _ in range(500):
        if not process.is_running() or process.status() in states:
            return True
        await asyncio.sleep(0.01)
    return False


async def test_a_peer_is_loaded_once_and_takes_turns(tmp_path: Path) -> None:
    async with peer(tmp_path) as engine:
        assert engine.facts == {"engine": "counting 1", "settings": {"model": "m", "threads": 2}}
        for _ in range(2):
            answer = await engine.run(WORK)
            assert answer.tokens == ((8, 9, 10), (2, 3, 4))
            assert answer.tokens_per_second == 6 / answer.seconds
    log = (tmp_path / "tiny.log").read_text()
    assert "this goes to the log" in log
    assert "so does this" in log


async def test_a_peer_rests_between_its_turns_and_ends_with_the_block(tmp_path: Path) -> None:
    async with peer(tmp_path) as engine:
        process = psutil.Process(engine._process.pid)
        assert await becomes(process, psutil.STATUS_STOPPED)
        await engine.run(WORK)
        assert await becomes(process, psutil.STATUS_STOPPED)
    assert not process.is_running()


async def test_what_a_paused_peer_started_ends_when_the_peer_is_killed(tmp_path: Path) -> None:
    async with peer(tmp_path, "child") as engine:
        child = psutil.Process(engine.facts["settings"]["child"])
        assert await becomes(child, psutil.STATUS_STOPPED)
        engine._process.kill()
        assert await becomes(child, psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("load", r"tiny: RuntimeError: no room for the model \(log: .*tiny\.log\); docs/peers\.md"),
        ("import", r"tiny ended with exit status 1: ModuleNotFoundError: No module named 'engine_that_nobody_insta"),
        ("babble", r"tiny said b'hello\\n', which is no JSON object"),
    ],
)
async def test_a_peer_that_cannot_start_says_why_in_one_line(tmp_path: Path, fault: str, said: str) -> None:
    with pytest.raises(StartupError, match=said) as caught:
        async with peer(tmp_path, fault):
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("run", r"tiny: ValueError: too many prompts"),
        ("die", r"tiny ended with exit status 3: out of memory"),
        ("lose", r"tiny answered 2 prompts with 1 texts of 3 tokens; each should have 3"),
    ],
)
async def test_a_turn_that_fails_says_why_in_one_line(tmp_path: Path, fault: str, said: str) -> None:
    async with peer(tmp_path, fault) as engine:
        with pytest.raises(Unavailable, match=said):
            await engine.run(WORK)


async def test_a_peer_that_hangs_is_given_up_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peering.peer._END_SECONDS", 0.1)
    engine = peer(tmp_path, "sleep", patience=0.3)
    with pytest.raises(StartupError, match=r"tiny took more than 0.3 s to load"):
        async with engine:
            pass
    assert engine._process.returncode == -9


def test_an_environment_without_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--peer vllm={tmp_path}: there is no .*bin/python; docs/peers.md"):
        find_python("vllm", tmp_path)
