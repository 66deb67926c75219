"""A whole embedded cluster of tiny random models: real processes, store and connections."""

import asyncio
import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import drafters, tiny

from dspark.client import Client
from dspark.cluster import Cluster, find_drafter
from dspark.errors import ConfigError, StartupError
from dspark.events import Completion, Delta
from dspark.sharing import OWN_OPTIONS, disagreement
from dspark.store import EmbeddedStore
from services.draft.settings import Settings as DraftSettings
from services.pair.settings import Settings
from services.verifier.settings import Settings as VerifySettings

PROMPT = [2, *range(5, 40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target, and a random drafter of its shapes."""
    target = tiny.save_qwen3(
        tmp_path_factory.mktemp("target"), vocab_size=drafters.VOCAB, hidden_size=drafters.HIDDEN, num_hidden_layers=5
    )
    drafter = tmp_path_factory.mktemp("drafter")
    drafters.save_published(drafter)
    return target, drafter


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    del os.environ["OMP_NUM_THREADS"]


def cluster_of(models: tuple[Path, Path], **settings: object) -> Cluster:
    exact = ["--dtype", "float32", "--threads", "1"]
    own: dict[str, Any] = {"draft_args": exact, "verify_args": exact} | settings
    return Cluster(models[0], models[1], **own)


async def complete(client: Client, *, speculation: bool = True, tokens: int = 60) -> Completion:
    return await client.complete(
        PROMPT, max_tokens=tokens, temperature=1.0, seed=3, ignore_eos=True, speculation=speculation
    )


def metrics_of(port: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        return bytes(page.read())


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


async def test_workers_come_go_and_die_and_the_tokens_stay(models: tuple[Path, Path], tmp_path: Path) -> None:
    before = children()
    async with cluster_of(models, log_dir=tmp_path) as cluster, cluster.client() as client:
        assert ",".join(cluster.workers) == "verify-1,draft-1"
        plain = await complete(client, speculation=False)
        drafted = await complete(client)
        assert plain.speculation.drafted == 0
        assert drafted.speculation.drafted > 0
        assert drafted.token_ids == plain.token_ids

        assert await cluster.add_draft() == "draft-2"
        assert await cluster.stop("draft-1") == 0
        assert (await complete(client)).token_ids == plain.token_ids

        assert await cluster.add_verify() == "verify-2"
        assert ",".join(cluster.workers) == "verify-1,draft-2,verify-2"
        async with client.generate(PROMPT, max_tokens=60, temperature=1.0, seed=3, ignore_eos=True) as stream:
            while not isinstance(await anext(stream), Delta):
                pass
            assert await cluster.stop("verify-1", signal.SIGKILL) == -signal.SIGKILL
            assert (await stream.completion()).token_ids == plain.token_ids

        with pytest.raises(ConfigError, match="no worker 'verify-9'"):
            await cluster.stop("verify-9")
        logs = {path.name for path in tmp_path.iterdir()}
        assert {"router.log", "store.log", "draft-2.log", "verify-1.log"} <= logs
    assert children() == before


async def test_workers_of_one_process_come_and_go_together(models: tuple[Path, Path], tmp_path: Path) -> None:
    before = children()
    async with cluster_of(models, log_dir=tmp_path, together=None) as cluster, cluster.client() as client:
        assert ",".join(cluster.workers) == "verify-1,draft-1"
        assert cluster.pid("verify-1") == cluster.pid("draft-1")
        lines = [json.loads(line) for line in (tmp_path / "pair-1.log").read_text().splitlines() if "ready" in line]
        shown = [str(lines[0][port]) for port in ("metrics_port", "draft_metrics_port")]
        assert len(set(shown)) == 2
        for port in shown:
            assert b"dspark_" in await asyncio.to_thread(metrics_of, port)
        plain = await complete(client, speculation=False)
        drafted = await complete(client)
        assert drafted.speculation.accepted > 0
        assert drafted.speculation.rejected > 0
        assert drafted.token_ids == plain.token_ids
        assert (await client.complete(PROMPT, max_tokens=60, temperature=1.0, seed=4)).token_ids != plain.token_ids

        assert await cluster.add_verify() == "verify-2"
        assert await cluster.add_draft() == "draft-2"
        lost: list[str] = []
        watching = asyncio.create_task(cluster.watch(lost.append))
        async with client.generate(PROMPT, max_tokens=60, temperature=1.0, seed=3, ignore_eos=True) as stream:
            while not isinstance(await anext(stream), Delta):
                pass
            assert await cluster.stop("draft-1", signal.SIGKILL) == -signal.SIGKILL
            assert (await stream.completion()).token_ids == plain.token_ids
        assert ",".join(cluster.workers) == "verify-2,draft-2"
        assert (await complete(client)).token_ids == plain.token_ids
        assert [ending.partition(":")[0] for ending in lost] == ["pair-1 was ended by SIGKILL"]
        watching.cancel()
    assert children() == before


async def test_workers_of_one_process_drain_while_streams_move(models: tuple[Path, Path]) -> None:
    async with cluster_of(models, together=True) as cluster, cluster.client() as client:
        plain = await complete(client, speculation=False)
        await cluster.add_verify()
        runs = [asyncio.create_task(complete(client)) for _ in range(6)]
        await asyncio.sleep(0.2)
        assert await cluster.stop("verify-1") == 0
        assert {(await run).token_ids for run in runs} == {plain.token_ids}
        assert cluster.workers == ("verify-2",)


async def test_what_cannot_be_one_process_is_said(models: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="no draft worker or no verify worker"):
        await cluster_of(models, together=True, draft=0).__aenter__()
    with pytest.raises(ConfigError, match="--threads has to be the same for both"):
        await cluster_of(models, together=True, draft_args=["--threads", "2"]).__aenter__()
    async with cluster_of(models, together=None, draft_args=["--dtype=float32"]) as cluster:
        assert cluster.pid("verify-1") != cluster.pid("draft-1")


def test_what_both_workers_have_must_be_the_same() -> None:
    assert disagreement(["--dtype", "float32", "--no-lookup"], ["--dtype=float32", "--pages", "9"]) == []
    assert disagreement(["--threads", "1"], ["--threads", "2"]) == ["--threads"]
    assert disagreement(["--no-bind-threads", "--profile", "off"], []) == ["--no-bind-threads", "--profile"]


def test_options_of_one_kind_of_worker_are_told_from_those_of_both() -> None:
    kinds = [set(settings.model_fields) for settings in (DraftSettings, VerifySettings)]
    own = {name.replace("_", "-") for name in kinds[0] ^ kinds[1]} - {"drafter", "target", "model"}  # a cluster's own
    assert {option.removeprefix("--").removeprefix("no-") for option in OWN_OPTIONS} == own
    both = (Settings.model_fields[name].default for name in kinds[0] & kinds[1])
    theirs = (VerifySettings.model_fields[name].default for name in kinds[0] & kinds[1])
    assert list(both) == list(theirs)


async def test_without_a_drafter_it_decodes_plainly_and_a_given_store_is_used(models: tuple[Path, Path]) -> None:
    async with EmbeddedStore() as url, cluster_of((models[0], Path("none")), store=url) as cluster:
        assert (cluster.store_url, cluster.drafter, cluster.workers) == (url, None, ("verify-1",))
        with pytest.raises(ConfigError, match="no drafter"):
            await cluster.add_draft()
        async with cluster.client() as client:
            assert (await client.describe()).drafter == ""
            assert (await complete(client, tokens=5)).speculation.rounds > 0
        watching = asyncio.create_task(cluster.watch())
        os.kill(cluster.pid("router"), signal.SIGKILL)
        with pytest.raises(Exception, match="router was ended by SIGKILL"):
            await watching


async def test_a_failed_start_says_why_and_leaves_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    before = children()
    with pytest.raises(StartupError, match=r"verify-1 ended with exit status 1: .*config\.json"):
        await cluster_of((tmp_path / "broken", Path("none")), log_dir=tmp_path / "logs").__aenter__()
    with pytest.raises(StartupError, match="cannot reach the store"):
        await cluster_of(models, store="redis://127.0.0.1:1", log_dir=tmp_path / "logs").__aenter__()
    with pytest.raises(StartupError, match=r"was not ready within 0\.1 s"):
        await cluster_of(models, start_seconds=0.1, log_dir=tmp_path / "logs").__aenter__()
    assert children() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
async def test_up_serves_until_told_and_takes_everything_with_it(
    models: tuple[Path, Path], tmp_path: Path, number: int, status: int
) -> None:
    command = ["-c", "from dspark.cli import main; main()", "up", "--json", "--drafter", "none", "--dtype", "float32"]
    up = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--listen", "127.0.0.1:0", "--model", str(models[0]), stdout=asyncio.subprocess.PIPE
    )
    assert up.stdout is not None
    facts = json.loads(await up.stdout.readline())
    programs = psutil.Process(up.pid).children()
    assert len(programs) == 3
    async with Client(facts["address"]) as client:
        assert len((await complete(client, tokens=5)).token_ids) == 5
    up.send_signal(number)
    assert await up.wait() == status
    _, alive = await asyncio.to_thread(psutil.wait_procs, programs, 5)
    assert [program for program in alive if program.status() != psutil.STATUS_ZOMBIE] == []


def test_drafters_by_name(tmp_path: Path) -> None:
    assert find_drafter("none", "gemma-3-270m") is None
    assert find_drafter("ngram", "gemma-3-270m") == Path("ngram")
    assert find_drafter("default", "a-model-without-one") is None
    (tmp_path / "config.json").write_text("{}")
    assert find_drafter(tmp_path, "m") == tmp_path
    with pytest.raises(ConfigError, match="is no directory with a config"):
        find_drafter(tmp_path / "nowhere", "m")
