"""The draft worker's gRPC face and program, as a router and an operator see them."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import drafters
from support.drafting import GREEDY, item, key_of, make_any, make_drafter, make_engine, make_features
from support.scripted_verifier import ScriptedVerifier
from support.scripted_verifier import running as running_verifier

from dspark.errors import InvalidRequest, StartupError, Unavailable, UnknownSequence
from dspark.messages import Attached, AttachSequence, ProposeItem, ProposeResult, SequenceKey
from dspark.models.drafters import save_drafter
from dspark.rpc.channel import connect
from dspark.rpc.codec import attach_call, decode, detach_call, propose_call
from dspark.rpc.server import serve
from dspark.rpc.session import Session
from dspark.store import Directory, EmbeddedStore
from dspark.v1 import draft_pb2 as pb
from dspark.v1.draft_pb2_grpc import DraftStub, add_DraftServicer_to_server
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer
from services.draft.service import DraftService
from services.draft.serving import prepare
from services.draft.settings import Settings
from services.draft.worker import DraftWorker

RouterSession = Session[pb.DraftRequest, pb.DraftReply]
FEATURES = make_features(40)
A, B = key_of("a"), key_of("b")


@dataclass
class Rig:
    worker: DraftWorker
    stub: DraftStub
    verifier: ScriptedVerifier
    verifier_address: str

    def attachment(self, key: SequenceKey) -> AttachSequence:
        return AttachSequence(key, self.verifier_address, GREEDY, 100)


@asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    drafter, verifier = make_drafter(), ScriptedVerifier()
    for key in (A, B):
        verifier.open(key, FEATURES, 20)
    offer = TapOffer.of(drafter, Path("tiny"))
    async with (
        running_verifier(verifier) as verifier_address,
        DraftWorker(make_engine(drafter), offer, metrics=DraftMetrics()) as worker,
    ):
        service = DraftService(worker, worker_id="d", drafter=offer.drafter)
        servicer = (add_DraftServicer_to_server, service, "dspark.v1.Draft")
        async with (
            serve("127.0.0.1:0", [servicer], grace=0.2) as server,
            connect(f"127.0.0.1:{server.port}") as channel,
        ):
            yield Rig(worker, DraftStub(channel), verifier, verifier_address)


async def attach(session: RouterSession, rig: Rig, *keys: SequenceKey) -> None:
    reply = await session.call(attach_call([rig.attachment(key) for key in keys]), timeout=5)
    answers: tuple[Attached, ...] = decode(reply.attached)
    assert [(answer.key, answer.error) for answer in answers] == [(key, None) for key in keys]


async def propose(session: RouterSession, *items: ProposeItem, wait: float = 2.0) -> ProposeResult:
    reply = await session.call(propose_call(items, wait), timeout=5)
    result: ProposeResult = decode(reply.proposed)
    return result


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_describe() -> None:
    async with running() as rig:
        described = await rig.stub.Describe(pb.DescribeDraftRequest())
        drafter = make_drafter()
        assert described.worker_id == "d"
        assert decode(described.drafter) == drafter.info
        assert described.load.running == 0
        assert described.load.free_pages == described.load.total_pages > 0


async def test_a_session_attaches_proposes_and_detaches() -> None:
    async with running() as rig, RouterSession(rig.stub.Session) as session:
        await attach(session, rig, A, B)
        result = await propose(session, item(A, 21), item(B, 21, max_tokens=2), item(key_of("x"), 21))
        first, second, third = result.proposals
        assert (len(first.tokens), len(second.tokens)) == (5, 2)
        assert len(first.confidences) == 5
        assert second.tokens == first.tokens[:2]
        assert isinstance(third.error, UnknownSequence)
        assert result.total_seconds > 0
        reply = await session.call(detach_call([A]), timeout=5)
        assert reply.WhichOneof("result") == "detached"
        again = await propose(session, item(A, 21), item(B, 21))
        assert [type(proposal.error) for proposal in again.proposals] == [UnknownSequence, type(None)]


async def test_a_waiting_call_does_not_hold_up_the_next() -> None:
    async with running() as rig, RouterSession(rig.stub.Session) as session:
        await attach(session, rig, A, B)
        waiting = asyncio.create_task(propose(session, item(A, 30), wait=5.0))
        began = time.monotonic()
        assert (await propose(session, item(B, 21), wait=5.0)).proposals[0].error is None
        assert time.monotonic() - began < 3
        assert not waiting.done()
        rig.verifier.grow(A, 29)
        assert (await waiting).proposals[0].error is None
        late = await propose(session, item(A, 35), wait=0.05)
        assert isinstance(late.proposals[0].error, Unavailable)
        assert "features of 29 positions are here, 34 are needed" in str(late.proposals[0].error)


@pytest.mark.parametrize("how", ["half-close", "cancel"])
async def test_a_router_that_leaves_takes_its_sequences_along(how: str) -> None:
    async with running() as rig:
        async with RouterSession(rig.stub.Session) as other:
            await attach(other, rig, B)
            stream = rig.stub.Session()
            await stream.write(attach_call([rig.attachment(A)]))
            await stream.read()
            assert rig.worker.load().running == 2
            await stream.write(propose_call([item(A, 90)], 9.0))  # would wait long
            await asyncio.sleep(0.05)
            if how == "cancel":
                stream.cancel()
            else:
                await stream.done_writing()
                rig.verifier.grow(A, 40)
                rig.worker.detach([A])  # ends the wait, so that the call can end in order
            await until(lambda: rig.worker.load().running == 1)
            assert (await propose(other, item(B, 21))).proposals[0].error is None
        await until(lambda: rig.worker.load().running == 0)


async def test_requests_that_are_none_are_refused() -> None:
    async with running() as rig, RouterSession(rig.stub.Session) as session:
        with pytest.raises(InvalidRequest, match="holds no call"):
            await session.call(pb.DraftRequest(), timeout=5)
        bad = pb.DraftRequest(attach=pb.AttachSequences(sequences=[pb.AttachSequence(sequence_id="a")]))
        bad.attach.sequences[0].sampling.mode = 9  # type: ignore[assignment]
        with pytest.raises(InvalidRequest, match="mode 9"):
            await session.call(bad, timeout=5)
        await attach(session, rig, A)
        assert (await propose(session, item(A, 21))).proposals[0].error is None


# ---------------------------------------------------------------- the program


@dataclass(frozen=True)
class Done:
    status: int
    err: str


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    command = [sys.executable, "-m", "services.draft", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(*arguments: str) -> Done:
    async with program(*arguments) as process, asyncio.timeout(100):
        assert process.stderr is not None
        err = await process.stderr.read()
        return Done(await process.wait(), err.decode())


async def test_the_program_serves_until_told_and_says_so_in_the_store(tmp_path: Path) -> None:
    drafters.save_published(tmp_path / "drafter")
    async with EmbeddedStore() as url, Directory(url) as directory:
        arguments = ["--drafter", str(tmp_path / "drafter"), "--store", url, "--worker-id", "d1", "--threads", "1"]
        async with program(*arguments) as process, asyncio.timeout(100):
            (record,) = await directory.wait_for(lambda records: len(records) == 1)
            assert (record.worker_id, record.role) == ("d1", "draft")
            assert record.drafter is not None
            assert record.drafter.name == "drafter"
            reader, writer = await asyncio.open_connection("127.0.0.1", record.metrics_port)
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert b"dspark_draft_proposals_total 0.0" in await reader.read()
            writer.close()
            async with connect(record.address) as channel:
                described = await DraftStub(channel).Describe(pb.DescribeDraftRequest())
            assert decode(described.drafter) == record.drafter
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            await directory.wait_for(lambda records: not records)


@pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3", "mtp", "ngram"])
def test_every_kind_of_drafter_is_made_ready(tiny_qwen: Path, tmp_path: Path, architecture: str) -> None:
    """From settings to an engine that has drafted already, without the weights that it arranged anew."""
    drafter = "ngram"
    if architecture != "ngram":
        save_drafter(make_any(architecture), tmp_path)
        drafter = str(tmp_path)
    engine, offer = prepare(Settings(drafter=Path(drafter), target=str(tiny_qwen), store="redis://unused"))
    assert offer.drafter.architecture == architecture
    assert (offer.tap is None) == (offer.drafter.tap_id == "") == (architecture == "ngram")
    assert engine.load().running == 0
    assert engine.load().free_pages == engine.load().total_pages


async def test_what_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    drafters.save_published(tmp_path / "drafter")
    good, nowhere = str(tmp_path / "drafter"), "redis://127.0.0.1:1/0"
    async with EmbeddedStore() as url:
        taken = url.removeprefix("redis://")
        cases = [
            (["--drafter", good, "--store", nowhere], "cannot reach the store at redis://127.0.0.1:1/0"),
            (["--drafter", good, "--store", url, "--listen", taken], f"cannot listen on {taken}"),
            (["--drafter", good, "--store", url, "--threads", "-1"], "threads: "),
            (
                ["--drafter", good, "--store", url, "--draft-weights", "int8", "--kernels", "torch"],
                "int8 needs compiled",
            ),
            (["--drafter", good], "store: "),
        ]
        for arguments, complaint in cases:
            done = await run(*arguments)
            assert done.status == 1, done.err
            assert "Traceback" not in done.err
            (line,) = [line for line in done.err.splitlines() if line.startswith("services.draft: ")]
            assert complaint in line


def test_what_cannot_be_loaded_is_a_startup_error(tmp_path: Path) -> None:
    drafters.save_published(tmp_path / "drafter")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    cases: list[tuple[dict[str, object], str]] = [
        ({"drafter": tmp_path / "none"}, "none"),
        ({"drafter": tmp_path / "broken"}, "broken"),
        ({"target": str(tmp_path / "none")}, "none"),
        ({"drafter": "ngram"}, "drafter ngram: the target is needed, for its vocabulary"),
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"device": "cuda:77"}, "device 'cuda:77'"),
        ({"kernels": "triton"}, "triton"),
    ]
    for changes, complaint in cases:
        settings = Settings(**{"drafter": tmp_path / "drafter", "store": "redis://unused", **changes})  # type: ignore[arg-type]
        with pytest.raises(StartupError, match=complaint):
            prepare(settings)
