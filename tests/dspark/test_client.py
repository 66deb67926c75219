"""The client against a small router in the same process."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dspark import errors
from dspark.client import Client, SyncClient
from dspark.events import Delta, Finished, Speculation, Started
from dspark.messages import Mode, ModelInfo, PositionLogprobs, TokenLogprob, WorkerLoad
from dspark.params import request_of
from dspark.rpc.codec import encode
from dspark.rpc.server import Server, serve
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import generation_pb2_grpc, types_pb2

MODEL = ModelInfo("m", "gemma3", "f", "n", 512, 64, 4, 2048, (1,), 2)
LOGPROBS = PositionLogprobs(TokenLogprob(7, -0.5), (TokenLogprob(7, -0.5),))


class Router(generation_pb2_grpc.RouterServicer):
    """Says "Hi!" to everything; to the prompts "slow", "full" and "broken" as they say."""

    def __init__(self) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.metadata: list[tuple[str, Any]] = []
        self.cancelled = asyncio.Event()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.metadata += context.invocation_metadata()
        if request.text == "full":
            raise errors.Overloaded("queue is full (2)", retry_after=0.25)
        yield pb.GenerateResponse(started=pb.Started(request_id="r1", prompt_tokens=3, seed=9, model="m"))
        yield pb.GenerateResponse(delta=pb.Delta(text="Hi", token_ids=[7], logprobs=[encode(LOGPROBS)]))
        if request.text == "slow":
            try:
                await asyncio.sleep(60)
            finally:
                self.cancelled.set()
        yield pb.GenerateResponse(delta=pb.Delta(text="!", token_ids=[8, 9]))
        if request.text == "broken":
            return
        yield pb.GenerateResponse(
            finished=pb.Finished(
                reason=pb.FINISH_REASON_STOP,
                usage=pb.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=3),
                timings=pb.Timings(queue_seconds=0.5, first_token_seconds=0.7, total_seconds=2.0),
                speculation=pb.SpeculationCounts(
                    enabled=True,
                    rounds=2,
                    drafted=6,
                    verified=4,
                    accepted=1,
                    verified_at=[2, 1],
                    accepted_at=[1, 0],
                    drafter="d",
                ),
                stop_match="X",
            )
        )

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse(found=request.request_id == "r1")

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeResponse:
        return pb.DescribeResponse(model=encode(MODEL), drafter="d", verify_length=4, version="1")

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Any) -> pb.GetLoadsResponse:
        worker = pb.WorkerStatus(worker_id="v1", role="verify", load=types_pb2.WorkerLoad(running=2), tokens=5)
        return pb.GetLoadsResponse(running=2, queue_limit=8, workers=[worker])

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        if request.no_special_tokens:
            return pb.TokenizeResponse(token_ids=[7], pieces=[request.text])
        return pb.TokenizeResponse(token_ids=[2, 7], pieces=["<bos>", request.text])


def running(router: Router) -> Server:
    return serve("127.0.0.1:0", [(generation_pb2_grpc.add_RouterServicer_to_server, router, "dspark.v1.Router")])


async def test_events_and_completion() -> None:
    async with running(Router()) as server, Client(f"127.0.0.1:{server.port}") as client:
        stream = client.generate("hello")
        events = [event async for event in stream]
        assert [type(event) for event in events] == [Started, Delta, Delta, Finished]
        completion = await stream.completion()
        assert completion == await client.complete("hello")
        assert (completion.text, completion.token_ids, completion.seed) == ("Hi!", (7, 8, 9), 9)
        assert completion.logprobs == (LOGPROBS,)
        assert (completion.finish_reason, completion.stop_match) == ("stop", "X")
        assert completion.tokens_per_second == 2.0
        assert completion.speculation.tau == 1.5
        assert completion.speculation.rejected == 3
        assert completion.speculation.verify_length == 2.0
        assert completion.speculation.conditional_acceptance == (0.5, 0.0)
        assert completion.to_dict()["speculation"]["tau"] == 1.5
        assert [piece async for piece in client.generate("hello").text()] == ["Hi", "!"]


async def test_every_parameter_arrives() -> None:
    router = Router()
    async with running(router) as server, Client(f"127.0.0.1:{server.port}", api_key="k") as client:
        await client.complete(
            [1, 2],
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            min_p=0.1,
            seed=2**64 - 1,
            mode="rejection",
            logprobs=0,
            max_tokens=5,
            stop=["a", "b"],
            stop_token_ids=[4],
            ignore_eos=True,
            speculation=False,
            max_verify_length=2,
            model="m",
            request_id="r7",
            timeout=30,
        )
    (sent,) = router.requests
    sampling = sent.sampling
    assert list(sent.token_ids.ids) == [1, 2]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.9, 0.1)
    assert (sampling.seed, sampling.mode, sampling.logprobs) == (2**64 - 1, types_pb2.SAMPLING_MODE_REJECTION, 0)
    assert sampling.HasField("logprobs")
    assert (sent.max_tokens, list(sent.stop), list(sent.stop_token_ids)) == (5, ["a", "b"], [4])
    assert (sent.ignore_eos, sent.speculation, sent.max_verify_length) == (True, pb.SPECULATION_OFF, 2)
    assert (sent.model, sent.request_id) == ("m", "r7")
    assert {("x-api-key", "k"), ("x-request-id", "r7")} <= set(router.metadata)


def test_what_is_left_out_stays_unset() -> None:
    request = request_of("p", {"temperature": None, "stop": "x"})
    assert not request.sampling.HasField("temperature")
    assert not request.HasField("max_tokens")
    assert list(request.stop) == ["x"]


def test_chat_messages() -> None:
    request = request_of([{"role": "user", "content": "hi"}], {"mode": Mode.COUPLED})
    assert request.WhichOneof("prompt") == "chat"
    assert request.chat.messages[0].content == "hi"
    assert request_of([], {}).WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("p", {"max_tokens": -1}, "max_tokens is -1"),
        ("p", {"top_k": 0.5}, "top_k is 0.5"),
        ("p", {"temperature": "hot"}, "temperature is 'hot'"),
        ("p", {"mode": "other"}, "mode 'other'"),
        ("p", {"stop_token_ids": [-1]}, "stop_token_ids"),
        ([2**32], {}, "token_ids"),
        ("\ud800", {}, "text"),
        ([{"role": "user"}], {}, "role and content"),
        ("p", {"stop": [3]}, "stop"),
    ],
)
def test_what_cannot_be_sent_is_an_invalid_request(prompt: Any, params: Any, message: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=message):
        request_of(prompt, params)


async def test_errors_are_ours() -> None:
    async with running(Router()) as server, Client(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(errors.Overloaded, match="queue is full") as overloaded:
            await client.complete("full")
        assert overloaded.value.retry_after == 0.25
        with pytest.raises(errors.Unavailable, match="before the completion was finished"):
            await client.complete("broken")
        with pytest.raises(errors.InvalidRequest, match="the limit is 4194304 bytes"):
            await client.complete("x" * (5 << 20))
        with pytest.raises(errors.DeadlineExceeded):
            await client.complete("slow", timeout=0.2)
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(errors.Unavailable):
            await client.describe()


async def test_leaving_a_stream_ends_it_at_the_router() -> None:
    router = Router()
    async with running(router) as server, Client(f"127.0.0.1:{server.port}") as client:
        async with client.generate("slow") as stream:
            assert isinstance(await anext(stream), Started)
        await asyncio.wait_for(router.cancelled.wait(), 2)


async def test_the_other_calls() -> None:
    async with running(Router()) as server, Client(f"127.0.0.1:{server.port}") as client:
        assert await client.abort("r1")
        assert not await client.abort("r2")
        info = await client.describe()
        assert (info.model, info.drafter, info.verify_length) == (MODEL, "d", 4)
        loads = await client.loads()
        assert loads.workers[0].load == WorkerLoad(running=2)
        assert [(token.id, token.piece) for token in await client.tokenize("t")] == [(2, "<bos>"), (7, "t")]
        assert len(await client.tokenize("t", special_tokens=False)) == 1


async def test_the_blocking_client() -> None:
    router = Router()

    def use(address: str) -> None:
        with SyncClient(address) as client:
            assert client.complete("hello").text == "Hi!"
            assert [type(event) for event in client.generate("hello")] == [Started, Delta, Delta, Finished]
            assert client.describe().drafter == "d"
            assert client.loads().running == 2
            assert client.tokenize("t")[1].piece == "t"
            assert not client.abort("r2")
            with pytest.raises(errors.Overloaded):
                list(client.generate("full"))
            events = client.generate("slow")
            next(events)
            events.close()  # type: ignore[attr-defined]

    async with running(router) as server:
        await asyncio.to_thread(use, f"127.0.0.1:{server.port}")
        await asyncio.wait_for(router.cancelled.wait(), 2)


def test_speculation_counts_add_up() -> None:
    parts = [
        Speculation(True, 2, 6, 4, 1, 0, (2, 1), (1, 0), "d"),
        Speculation(True, 3, 9, 9, 7, 1, (3, 2, 2), (2, 2, 2)),
    ]
    total = Speculation.total(parts)
    assert total == Speculation(True, 5, 15, 13, 8, 1, (5, 3, 2), (3, 2, 2), "d")
    assert total.tau == pytest.approx(13 / 5)
    assert Speculation.total([]).tau == 0
