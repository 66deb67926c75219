"""The client against a small router in the same process."""

import asyncio
from typing import Any

import pytest
from support.scripted_router import LOGPROBS, MODEL, ScriptedRouter, running

from dspark import errors
from dspark.client import Client, SyncClient
from dspark.events import Delta, Finished, Speculation, Started
from dspark.messages import Mode, WorkerLoad
from dspark.params import request_of
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import types_pb2


async def test_events_and_completion() -> None:
    async with running(ScriptedRouter()) as server, Client(f"127.0.0.1:{server.port}") as client:
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
    router = ScriptedRouter()
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
            policy="fixed:3",
            whole=False,
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
    assert (sent.policy, sent.model, sent.request_id, sent.whole) == ("fixed:3", "m", "r7", False)
    assert {("x-api-key", "k"), ("x-request-id", "r7")} <= set(router.metadata)


async def test_only_a_completion_is_asked_for_as_a_whole() -> None:
    router = ScriptedRouter()
    async with running(router) as server, Client(f"127.0.0.1:{server.port}") as client:
        await client.complete("hello")
        await client.generate("hello").completion()
    assert [sent.whole for sent in router.requests] == [True, False]


def test_what_is_left_out_stays_unset() -> None:
    request = request_of("p", {"temperature": None, "stop": "x"})
    assert not request.sampling.HasField("temperature")
    assert not request.HasField("max_tokens")
    assert not request.HasField("policy")
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
    async with running(ScriptedRouter()) as server, Client(f"127.0.0.1:{server.port}") as client:
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
    router = ScriptedRouter()
    async with running(router) as server, Client(f"127.0.0.1:{server.port}") as client:
        async with client.generate("slow") as stream:
            assert isinstance(await anext(stream), Started)
        await asyncio.wait_for(router.cancelled.wait(), 2)


async def test_the_other_calls() -> None:
    async with running(ScriptedRouter()) as server, Client(f"127.0.0.1:{server.port}") as client:
        assert await client.abort("r1")
        assert not await client.abort("r2")
        info = await client.describe()
        assert (info.model, info.drafter, info.verify_length) == (MODEL, "d", 4)
        loads = await client.loads()
        assert loads.workers[0].load == WorkerLoad(running=2)
        assert [(token.id, token.piece) for token in await client.tokenize("t")] == [(2, "<bos>"), (7, "t")]
        assert len(await client.tokenize("t", special_tokens=False)) == 1


async def test_the_blocking_client() -> None:
    router = ScriptedRouter()

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


async def test_a_client_that_is_not_open_says_so() -> None:
    client = Client("127.0.0.1:1")
    for _ in range(2):
        with pytest.raises(errors.Unavailable, match="not open"):
            client.generate("hello")
        async with client:
            pass


def test_speculation_counts_add_up() -> None:
    parts = [
        Speculation(True, 2, 6, 4, 1, 0, (2, 1), (1, 0), "d"),
        Speculation(True, 3, 9, 9, 7, 1, (3, 2, 2), (2, 2, 2)),
    ]
    total = Speculation.total(parts)
    assert total == Speculation(True, 5, 15, 13, 8, 1, (5, 3, 2), (3, 2, 2), "d")
    assert total.tau == pytest.approx(13 / 5)
    assert Speculation.total([]).tau == 0


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ("hi", {"temprature": 1.0}, "unknown parameter 'temprature'"),
        ("hi", {"request_id": "ü"}, "request_id"),
        ("hi", {"request_id": "a\nb"}, "request_id"),
        (b"hi", {}, "the prompt is bytes"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_it_is(prompt: Any, params: Any, reason: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=reason):
        request_of(prompt, params)


def test_addresses_and_keys_are_checked() -> None:
    with pytest.raises(errors.ConfigError, match="host:port"):
        Client("127.0.0.1:99999")
    with pytest.raises(errors.InvalidRequest, match="api_key"):
        Client("127.0.0.1:1", api_key="schlüssel")
