"""`python -m services.verifier` as operators start it: ready in the store, serving, draining, failing in one line."""

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.verifying import GREEDY, Stream, make_engine

from dspark.costs.files import read_profile
from dspark.errors import ModelFileError, StartupError, Unavailable
from dspark.messages import OpenSequence, SequenceKey, StepItem
from dspark.processes import Child, spawn
from dspark.rpc.channel import connect
from dspark.rpc.codec import close_call, decode, open_call, step_call
from dspark.rpc.session import Session
from dspark.store import Directory, EmbeddedStore, WorkerRecord
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierStub
from services.verifier.settings import Settings
from services.verifier.tokenizer_files import chat_template, tokenizer_files
from services.verifier.worker import prepare

RouterSession = Session[pb.VerifierRequest, pb.VerifierReply]
PROMPT = (2, *range(40, 75))
KEY = SequenceKey("a", 0)


@asynccontextmanager
async def worker(model: Path, tmp_path: Path, *more: str) -> AsyncIterator[tuple[Child, Directory]]:
    log = tmp_path / "verifier.log"
    async with EmbeddedStore() as url, Directory(url) as directory:
        flags = ["--model", str(model), "--store", url, "--dtype", "float32", "--pages", "64", "--worker-id", "v1"]
        command = [sys.executable, "-m", "services.verifier", *flags, "--threads", "1", *more]
        child = await spawn("verifier", command, log_path=log)
        try:
            yield child, directory
        finally:
            await child.stop(signal.SIGKILL)
            sys.stderr.write(log.read_text())


async def record(child: Child, directory: Directory, *, draining: bool = False) -> WorkerRecord:
    """The worker's record, once it is there and as asked for."""
    async with asyncio.timeout(60):
        while True:
            assert child.returncode is None, child.last_line()
            for found in directory.workers():
                if found.load.draining == draining:
                    return found
            await asyncio.sleep(0.05)


async def test_a_worker_serves_drains_and_ends(tiny_gemma: Path, tmp_path: Path) -> None:
    expected = Stream(make_engine(tiny_gemma), "a", PROMPT, new=2).run()
    async with worker(tiny_gemma, tmp_path) as (child, directory):
        found = await record(child, directory)
        assert (found.worker_id, found.role, found.page_size) == ("v1", "verify", 16)
        assert found.model is not None
        assert found.model.vocab_size == 512
        with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{found.metrics_port}/metrics") as page:
            assert b"dspark_kv_cache_usage_perc 0.0" in page.read()
        async with connect(found.address) as channel, RouterSession(VerifierStub(channel).Session) as session:
            await session.call(open_call([OpenSequence(KEY, PROMPT, GREEDY, 60)]), timeout=10)
            child.send(signal.SIGTERM)
            await record(child, directory, draining=True)
            late = await session.call(open_call([OpenSequence(SequenceKey("b", 0), PROMPT, GREEDY, 60)]), timeout=10)
            assert isinstance(decode(late.opened)[0].error, Unavailable)
            tokens = []
            for n, count in ((len(PROMPT), len(PROMPT)), (len(PROMPT) + 1, 1)):  # what is open is served to its end
                reply = await session.call(step_call([StepItem(KEY, n, count)]), timeout=10)
                assert reply.load.draining
                tokens.append(decode(reply.step).verdicts[0].token)
            assert tokens == expected
            assert child.returncode is None
            await session.call(close_call([KEY]), timeout=10)
            assert await child.wait(10) == 0
        assert b"Traceback" not in child.log_path.read_bytes()
        async with asyncio.timeout(5):
            while directory.workers():
                await asyncio.sleep(0.05)


async def test_draining_ends_in_time_though_a_sequence_stays_open(tiny_qwen: Path, tmp_path: Path) -> None:
    async with worker(tiny_qwen, tmp_path, "--drain-seconds", "0.5") as (child, directory):
        found = await record(child, directory)
        async with connect(found.address) as channel, RouterSession(VerifierStub(channel).Session) as session:
            await session.call(open_call([OpenSequence(KEY, PROMPT, GREEDY, 60)]), timeout=10)
            child.send(signal.SIGTERM)
            assert await child.wait(10) == 0
            assert session.broken.is_set()


async def test_a_worker_publishes_what_its_steps_cost(
    tiny_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    flags = ["--profile", "auto", "--profile-seconds", "1", "--max-step-tokens", "64"]
    async with worker(tiny_gemma, tmp_path, *flags) as (child, directory):
        found = await record(child, directory)
        kept = read_profile(found.profile_fingerprint)
        assert kept is not None
        async with asyncio.timeout(5):
            while directory.profile(found.profile_fingerprint) is None:
                await asyncio.sleep(0.05)
        assert directory.profile(found.profile_fingerprint) == kept
        assert found.load.running == 0
        assert found.load.free_pages == found.load.total_pages
        async with connect(found.address) as channel, RouterSession(VerifierStub(channel).Session) as session:
            await session.call(open_call([OpenSequence(KEY, PROMPT, GREEDY, 60)]), timeout=10)
            await session.call(step_call([StepItem(KEY, len(PROMPT), len(PROMPT))]), timeout=10)
            await asyncio.sleep(0.1)  # a step is learned of once it has been told
            reply = await session.call(step_call([StepItem(KEY, len(PROMPT) + 1, 1)]), timeout=10)
            result = decode(reply.step)
            assert result.fixed_seconds + result.marginal_seconds > 0
            assert reply.load.observed_ratio > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--store", "redis://127.0.0.1:1"], "cannot reach the store"),
        (["--store", "nonsense"], "store"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--listen", "1.2.3.4:1"], "cannot listen"),
        (["--pages", "0"], "pages"),
        (["--dtype", "float8"], "dtype"),
        (["--weights", "int8", "--dtype", "float32"], "int8 goes with dtype bfloat16"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
async def test_what_cannot_start_says_why_in_one_line(tiny_gemma: Path, flags: list[str], says: str) -> None:
    async with EmbeddedStore() as url:
        settings = {"--model": str(tiny_gemma), "--store": url} | dict(zip(flags[::2], flags[1::2], strict=True))
        command = [sys.executable, "-m", "services.verifier", *(part for pair in settings.items() for part in pair)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("services.verifier: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"kernels": "triton"}, "triton"), ({"device": "abacus"}, "abacus"), ({"device": "cuda:99"}, "GPU")],
)
def test_what_this_machine_has_not_is_a_startup_error(tiny_gemma: Path, changes: dict[str, str], says: str) -> None:
    settings = Settings(model=str(tiny_gemma), store="redis://127.0.0.1:1", **changes)  # type: ignore[arg-type]
    with pytest.raises(StartupError, match=says):
        prepare(settings, tiny_gemma)


def test_a_gguf_file_needs_its_tokenizer_beside_it(tmp_path: Path, tiny_gemma: Path) -> None:
    info = make_engine(tiny_gemma).info
    with pytest.raises(ModelFileError, match="needs one beside it"):
        tokenizer_files(tmp_path / "model.gguf", info)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", "T"),
        ("tokenizer_config.json", '{"chat_template": "T"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "x", "template": "U"}, {"name": "default", "template": "T"}]}',
        ),
    ],
)
def test_chat_templates_are_found_wherever_models_keep_them(tmp_path: Path, name: str, text: str) -> None:
    assert chat_template(tmp_path) is None
    (tmp_path / name).write_text(text)
    assert chat_template(tmp_path) == "T"


def test_settings_come_from_the_environment() -> None:
    environment = {**os.environ, "DSPARK_STORE": "redis://127.0.0.1:1", "DSPARK_MODEL": "x"}
    command = [sys.executable, "-m", "services.verifier"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    assert "cannot reach the store at redis://127.0.0.1:1" in done.stderr
