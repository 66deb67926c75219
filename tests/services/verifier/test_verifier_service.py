"""The verify worker over real gRPC: what a router and a draft worker see."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.verifying import GREEDY, Stream, make_engine, make_tap

from dspark.errors import InvalidRequest, StaleMessage, UnknownSequence
from dspark.messages import FeatureBlock, OpenSequence, Sampling, SequenceKey, StepItem, StepResult, TapInfo
from dspark.rpc.channel import connect
from dspark.rpc.codec import close_call, decode, encode, open_call, step_call
from dspark.rpc.pieces import join, split
from dspark.rpc.server import serve
from dspark.rpc.session import Session
from dspark.tokenizer import Tokenizer
from dspark.v1 import types_pb2
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierStub, add_VerifierServicer_to_server
from services.verifier.engine import VerifyEngine
from services.verifier.service import VerifierService
from services.verifier.thread import EngineThread
from services.verifier.tokenizer_files import tokenizer_files

RouterSession = Session[pb.VerifierRequest, pb.VerifierReply]
PROMPT = [2, *range(40, 75), 9, 9, 17, 300, 41]


@dataclass
class Rig:
    engine: VerifyEngine
    channel: grpc.aio.Channel
    stub: VerifierStub
    port: int


@asynccontextmanager
async def running(path: Path, *, queue_bytes: int = 1 << 20, pages: int = 64) -> AsyncIterator[Rig]:
    engine = make_engine(path, pages=pages)
    with EngineThread(engine) as thread:
        files = tokenizer_files(path, engine.info)
        service = VerifierService(thread, worker_id="v", page_size=16, files=files, feature_queue_bytes=queue_bytes)
        servicer = (add_VerifierServicer_to_server, service, "dspark.v1.Verifier")
        async with (
            serve("127.0.0.1:0", [servicer], grace=0.2) as server,
            connect(f"127.0.0.1:{server.port}") as channel,
        ):
            yield Rig(engine, channel, VerifierStub(channel), server.port)


async def generate(session: RouterSession, name: str, *, new: int = 12, close: bool = True) -> list[int]:
    """Tokens of one sequence, as a router gets them."""
    key, ids = SequenceKey(name, 0), list(PROMPT)
    opened = await session.call(open_call([OpenSequence(key, tuple(ids), GREEDY, len(ids) + new)]), timeout=5)
    computed = decode(opened.opened)[0].computed_len
    while len(ids) < len(PROMPT) + new:
        drafts = (ids[-1], 7)
        reply = await session.call(step_call([StepItem(key, len(ids), len(ids) - computed, drafts)]), timeout=5)
        result: StepResult = decode(reply.step)
        (verdict,) = result.verdicts
        assert verdict.error is None
        assert verdict.token is not None
        ids += [*drafts[: verdict.accepted], verdict.token]
        computed = verdict.computed_len
    if close:
        reply = await session.call(close_call([key]), timeout=5)
        assert reply.WhichOneof("result") == "closed"
        assert reply.load.running == 0
    return ids[len(PROMPT) :]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_session_generates_what_the_engine_alone_does(tiny_gemma: Path) -> None:
    expected = Stream(make_engine(tiny_gemma), "a", PROMPT, new=12).run()
    async with running(tiny_gemma) as rig, RouterSession(rig.stub.Session) as session:
        assert await generate(session, "a") == expected


async def test_two_routers_share_a_worker(tiny_gemma: Path) -> None:
    expected = Stream(make_engine(tiny_gemma), "a", PROMPT, new=12).run()
    async with running(tiny_gemma) as rig, connect(f"127.0.0.1:{rig.port}") as other:
        async with RouterSession(rig.stub.Session) as one, RouterSession(VerifierStub(other).Session) as two:
            calls = [generate(s, f"{i}", close=False) for i, s in enumerate((one, two, one, two))]
            assert await asyncio.gather(*calls) == [expected] * 4
            assert rig.engine.load().running == 4
        await until(lambda: rig.engine.load().running == 0)


async def test_describe_and_tokenizer(tiny_qwen: Path) -> None:
    async with running(tiny_qwen) as rig:
        described = await rig.stub.Describe(pb.DescribeVerifierRequest())
        assert (described.worker_id, described.page_size, described.max_step_tokens) == ("v", 16, 512)
        assert decode(described.model) == rig.engine.info
        assert described.load.total_pages == described.load.free_pages
        files = await join(rig.stub.FetchTokenizer(pb.FetchTokenizerRequest()))
        tokenizer = Tokenizer(files["tokenizer.json"], files["model.json"])
        assert tokenizer.eos_token_ids == (1,)
        assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
        assert json.loads(files["model.json"])["chat_template"] is None


@pytest.mark.parametrize("how", ["half-close", "cancel"])
async def test_a_router_that_leaves_frees_its_pages_at_once(tiny_gemma: Path, how: str) -> None:
    async with running(tiny_gemma) as rig:
        stream = rig.stub.Session()
        await stream.write(open_call([opening(f"s{i}") for i in range(3)]))
        assert [answer.error for answer in decode((await stream.read()).opened)] == [None] * 3
        await stream.write(step_call([StepItem(SequenceKey("s0", 0), len(PROMPT), len(PROMPT))]))
        assert rig.engine.load().running == 3
        if how == "half-close":
            await stream.done_writing()
        else:
            stream.cancel()
        await until(lambda: rig.engine.load().running == 0)
        assert rig.engine.load().free_pages == rig.engine.load().total_pages


KILLED_ROUTER = """
import sys, time, grpc
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierStub

def requests():
    yield pb.VerifierRequest.FromString(bytes.fromhex(sys.argv[2]))
    time.sleep(60)

for reply in VerifierStub(grpc.insecure_channel(sys.argv[1])).Session(requests()):
    print(len(reply.opened.sequences), flush=True)
"""


async def test_a_killed_router_frees_its_pages_at_once(tiny_gemma: Path) -> None:
    async with running(tiny_gemma) as rig:
        request = open_call([opening("s0"), opening("s1")]).SerializeToString().hex()
        command = [sys.executable, "-c", KILLED_ROUTER, f"127.0.0.1:{rig.port}", request]
        router = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert router.stdout is not None
        assert await router.stdout.readline() == b"2\n"
        assert rig.engine.load().running == 2
        router.kill()
        await router.wait()
        await until(lambda: rig.engine.load().running == 0)


def opening(name: str) -> OpenSequence:
    return OpenSequence(SequenceKey(name, 0), tuple(PROMPT), GREEDY, 60)


async def test_bad_items_and_calls_are_answered_in_the_session(tiny_gemma: Path) -> None:
    async with running(tiny_gemma) as rig, RouterSession(rig.stub.Session) as session:
        key = SequenceKey("a", 2)
        bad = OpenSequence(SequenceKey("b", 0), (2, 5), Sampling(temperature=-1), 60)
        reply = await session.call(open_call([OpenSequence(key, tuple(PROMPT), GREEDY, 60), bad]), timeout=5)
        answers = decode(reply.opened)
        assert answers[0].error is None
        assert isinstance(answers[1].error, InvalidRequest)
        items = [StepItem(SequenceKey("a", 1), 3, 1), StepItem(SequenceKey("z", 0), 3, 1)]
        verdicts = decode((await session.call(step_call(items), timeout=5)).step).verdicts
        assert [type(verdict.error) for verdict in verdicts] == [StaleMessage, UnknownSequence]
        with pytest.raises(InvalidRequest, match="no call"):
            await session.call(pb.VerifierRequest(), timeout=5)
        odd = open_call([OpenSequence(SequenceKey("c", 0), (2,), GREEDY, 9)])
        odd.open.sequences[0].sampling.mode = 77  # type: ignore[assignment]
        with pytest.raises(InvalidRequest, match="mode"):
            await session.call(odd, timeout=5)
        assert rig.engine.load().running == 1


async def test_bytes_that_are_no_message_are_refused_and_harm_nothing(tiny_gemma: Path) -> None:
    async with running(tiny_gemma) as rig:
        channel: Any = rig.channel  # without the generated code's types
        for method in ("Session", "Features"):
            call = channel.stream_stream(f"/dspark.v1.Verifier/{method}")()
            await call.write(b"\xff\xff\xff not a message")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/dspark.v1.Verifier/Describe")(b"\x0a\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        async with RouterSession(rig.stub.Session) as session:
            assert len(await generate(session, "after")) == 12


# ---------------------------------------------------------------- taps and features


def registration(info: TapInfo, tensors: dict[str, torch.Tensor], piece: int = 1000) -> list[pb.RegisterTapRequest]:
    messages = [pb.RegisterTapRequest(info=encode(info))]
    for name, tensor in tensors.items():
        messages += [pb.RegisterTapRequest(piece=p) for p in split(name, tensor.numpy().tobytes(), piece)]
    return messages


async def test_features_come_over_the_wire(tiny_gemma: Path) -> None:
    info, tensors = make_tap(bias=True)
    async with running(tiny_gemma, queue_bytes=500) as rig, RouterSession(rig.stub.Session) as session:
        registered = await rig.stub.RegisterTap(iter(registration(info, tensors)))
        assert registered.tap_id == info.tap_id
        assert list((await rig.stub.Describe(pb.DescribeVerifierRequest())).tap_ids) == [info.tap_id]
        features = rig.stub.Features()
        key = SequenceKey("a", 0)
        await generate(session, "a", close=False)
        subscribe = pb.Subscribe(sequence_id="a", tap_id=info.tap_id, from_position=0)
        await features.write(pb.FeatureRequest(subscribe=subscribe))
        expected = rig.engine._sequences["a"].computed_len
        received = 0
        while received < expected:
            for block in await blocks(features):
                assert (block.key, block.start, block.error) == (key, received, None)
                assert len(block.data) == 2 * block.count * info.feature_size
                received += block.count
        await features.write(pb.FeatureRequest(subscribe=pb.Subscribe(sequence_id="zzz", tap_id=info.tap_id)))
        [unknown] = await blocks(features)
        assert isinstance(unknown.error, UnknownSequence)
        await session.call(close_call([key]), timeout=5)
        [ended] = await blocks(features)
        assert isinstance(ended.error, UnknownSequence)
        await features.done_writing()
        assert await features.read() is grpc.aio.EOF
        await until(lambda: not rig.engine._feed.taps_in_use)


async def blocks(features: Any) -> list[FeatureBlock]:
    """Those of the next message."""
    return [decode(block) for block in (await features.read()).blocks]


async def test_a_late_tap_is_recomputed_while_nothing_else_runs(tiny_gemma: Path) -> None:
    info, tensors = make_tap()
    async with running(tiny_gemma) as rig, RouterSession(rig.stub.Session) as session:
        await generate(session, "a", close=False)
        await rig.stub.RegisterTap(iter(registration(info, tensors)))
        features = rig.stub.Features()
        await features.write(pb.FeatureRequest(subscribe=pb.Subscribe(sequence_id="a", tap_id=info.tap_id)))
        found: list[FeatureBlock] = []
        async with asyncio.timeout(5):
            while len(found) < 2:  # both may come in one message
                found += await blocks(features)
        [refusal, block] = found
        assert refusal.error is not None
        assert (block.start, block.count) == (0, rig.engine._sequences["a"].computed_len)


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("nothing", grpc.StatusCode.INVALID_ARGUMENT),
        ("no info", grpc.StatusCode.INVALID_ARGUMENT),
        ("unknown tensor", grpc.StatusCode.INVALID_ARGUMENT),
        ("announced too large", grpc.StatusCode.INVALID_ARGUMENT),
        ("piece lost", grpc.StatusCode.INVALID_ARGUMENT),
        ("other bytes", grpc.StatusCode.INVALID_ARGUMENT),
        ("last layer", grpc.StatusCode.FAILED_PRECONDITION),
        ("other target", grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_broken_registrations_have_a_status(tiny_gemma: Path, case: str, status: grpc.StatusCode) -> None:
    info, tensors = make_tap()
    messages = registration(info, tensors)
    if case == "nothing":
        messages = []
    elif case == "no info":
        messages = messages[1:]
    elif case == "unknown tensor":
        messages[1].piece.name = "fc"
    elif case == "announced too large":
        messages[1:] = [pb.RegisterTapRequest(piece=types_pb2.Piece(name="fc.weight", size=1 << 40, data=b"x"))]
    elif case == "piece lost":
        del messages[2]
    elif case == "other bytes":
        messages[-1].piece.data = bytes(len(messages[-1].piece.data))
    elif case == "last layer":
        messages = registration(*make_tap(layers=(1, 5)))
    else:
        messages = registration(*make_tap(model_fingerprint="0" * 32))
    async with running(tiny_gemma) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.RegisterTap(iter(messages))
        assert caught.value.code() is status
        assert rig.engine.tap_ids == ()
        await rig.stub.RegisterTap(iter(registration(info, tensors)))
