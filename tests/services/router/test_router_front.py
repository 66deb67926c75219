"""The router's front: who may wait, who is refused, and what happens when clients go, stall or send nonsense."""

import asyncio
import time
from typing import Any

import grpc
import pytest
from support.toys import (
    BOS,
    VOCAB,
    Cluster,
    ToyDraft,
    ToyVerifier,
    by_fives,
    cluster,
    expected,
    ids_of,
    letters,
    quietly,
    request_of,
    until,
)

from dspark.errors import DeadlineExceeded
from dspark.messages import Sampling
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import generation_pb2_grpc
from services.router.outlet import Delta, Outlet
from services.router.requests import Request
from services.router.sequences import Sequence

PROMPT = [BOS, *ids_of("hello")]
CODE = grpc.StatusCode


async def refused(toys: Cluster, request: Any, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in toys.stub().Generate(request, **options):
            pass
    return caught.value


async def assert_healthy(toys: Cluster) -> None:
    result = await toys.generate("hello", max_tokens=10)
    assert result.ids == expected(letters, PROMPT, 5, 10)
    assert len(toys.engine.active) == 0


def slow_verifier(**options: Any) -> ToyVerifier:
    verifier = ToyVerifier(**options)
    verifier.delay = 0.003
    return verifier


# ---------------------------------------------------------------- cancellation


async def test_a_whole_answer_that_is_aborted_has_what_there_was() -> None:
    async with cluster(slow_verifier(), ToyDraft()) as toys:
        call = toys.stub().Generate(request_of("hello", max_tokens=400, request_id="mine", whole=True))
        await call.read()
        sequence = toys.engine.active.get("mine")
        assert sequence is not None
        await until(lambda: sequence.completion_tokens > 20)
        assert (await toys.stub().Abort(pb.AbortRequest(request_id="mine"))).found
        delta = (await call.read()).delta
        assert list(delta.token_ids) == expected(letters, PROMPT, 5, len(delta.token_ids))
        assert len(delta.text) == len(delta.token_ids) > 20
        with pytest.raises(grpc.aio.AioRpcError, match="aborted on request"):
            await call.read()


@pytest.mark.parametrize("how", ["cancel", "abort", "deadline"])
async def test_both_workers_are_free_within_a_round(how: str) -> None:
    verifier, drafter = slow_verifier(), ToyDraft()
    async with cluster(verifier, drafter) as toys:
        call = toys.stub().Generate(
            request_of("hello", max_tokens=5000, request_id="mine"), timeout=0.3 if how == "deadline" else None
        )
        reading = asyncio.create_task(quietly(call))
        await until(lambda: drafter.proposals > 3)
        if how == "abort":
            assert (await toys.stub().Abort(pb.AbortRequest(request_id="mine"))).found
        elif how == "cancel":
            call.cancel()
        await reading
        began, steps = time.monotonic(), len(verifier.steps)
        await until(lambda: "mine" in verifier.closed_at and "mine" in drafter.detached_at)
        assert time.monotonic() - began < 2
        assert len(verifier.steps) - steps <= 3
        wanted = {"cancel": CODE.CANCELLED, "abort": CODE.CANCELLED, "deadline": CODE.DEADLINE_EXCEEDED}
        assert await call.code() is wanted[how]
        assert not verifier.open
        assert not drafter.attached
        assert verifier.free == verifier.pages
        await assert_healthy(toys)
        assert not (await toys.stub().Abort(pb.AbortRequest(request_id="mine"))).found


async def test_a_client_that_leaves_before_its_sequence_is_open_leaves_nothing_behind() -> None:
    verifier = ToyVerifier()
    async with cluster(verifier) as toys:
        verifier.hang = True
        call = toys.stub().Generate(request_of("hello", max_tokens=50))
        reading = asyncio.create_task(quietly(call))
        await until(lambda: toys.engine.verifiers.links["verify-0"].opening)
        call.cancel()
        await reading
        await until(lambda: len(toys.engine.active) == 0)
        verifier.hang = False
        await until(lambda: verifier.opened and not verifier.open)
        await assert_healthy(toys)


async def test_deadlines_hold_in_the_queue() -> None:
    verifier = slow_verifier(pages=4)
    async with cluster(verifier) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=50, sampling={"seed": 1}))
        await until(lambda: verifier.open)
        error = await refused(toys, request_of("hello", max_tokens=50), timeout=0.1)
        assert error.code() is CODE.DEADLINE_EXCEEDED
        await until(lambda: len(toys.engine.active) == 1)
        assert len(toys.engine.dispatcher) == 0
        assert (await running).ids == expected(letters, PROMPT, 1, 50)
        assert len(verifier.opened) == 1


# ---------------------------------------------------------------- admission


async def test_a_full_queue_refuses_at_once_with_a_hint() -> None:
    verifier = slow_verifier(pages=4)
    async with cluster(verifier, max_queue=3) as toys:
        readings = [asyncio.create_task(quietly(toys.stub().Generate(request_of("hello", max_tokens=50))))]
        await until(lambda: verifier.open)
        calls = [toys.stub().Generate(request_of("hello", max_tokens=50)) for _ in range(3)]
        readings += [asyncio.create_task(quietly(call)) for call in calls]
        await until(lambda: toys.services[0]._admission.queued == 3)
        loads = await toys.stub().GetLoads(pb.GetLoadsRequest())
        assert (loads.running, loads.queued, loads.queue_limit) == (1, 3, 3)
        error = await refused(toys, request_of("hello", max_tokens=50))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        assert "the limit is 3" in str(error.details())
        assert int(str(error.trailing_metadata()["retry-after-ms"])) >= 100
        await asyncio.gather(*readings)
        await assert_healthy(toys)


async def test_each_api_key_has_its_rate() -> None:
    async with cluster(rate=3) as toys:
        began = time.monotonic()

        async def call(key: str) -> Any:
            try:
                await toys.generate("hello", max_tokens=1, metadata=(("x-api-key", key),))
            except grpc.aio.AioRpcError as error:
                return error
            return time.monotonic() - began

        first = await asyncio.gather(*(call("a") for _ in range(7)))
        other = await call("b")
    errors = [outcome for outcome in first if isinstance(outcome, grpc.aio.AioRpcError)]
    waits = sorted(outcome for outcome in first if isinstance(outcome, float))
    assert len(errors) == 1
    assert errors[0].code() is CODE.RESOURCE_EXHAUSTED
    assert "3 a second" in str(errors[0].details())
    assert waits[3] > 0.95  # the fourth had to wait for the next second
    assert isinstance(other, float)


async def test_bearer_tokens_are_keys_too() -> None:
    async with cluster(rate=1) as toys:
        metadata = (("authorization", "Bearer k"),)
        calls = [asyncio.create_task(toys.generate("hello", max_tokens=1, metadata=metadata)) for _ in range(3)]
        done = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(outcome, grpc.aio.AioRpcError) for outcome in done) == 1


async def test_request_ids_are_kept_and_unique() -> None:
    verifier = slow_verifier()
    async with cluster(verifier, ToyDraft()) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=100, metadata=(("x-request-id", "mine"),)))
        await until(lambda: verifier.open)
        assert verifier.opened[0].request_id == "mine"
        error = await refused(toys, request_of("hello", request_id="mine"))
        assert error.code() is CODE.INVALID_ARGUMENT
        assert "'mine'" in str(error.details())
        assert (await running).started.request_id == "mine"
        again = await toys.generate("hello", max_tokens=1, request_id="mine")
        assert again.started.request_id == "mine"
        assert len((await toys.generate("hello", max_tokens=1)).started.request_id) == 32


async def test_a_request_that_comes_before_any_worker_waits_for_one() -> None:
    verifier = ToyVerifier()
    verifier.listed = False
    async with cluster(verifier) as toys:
        waiting = asyncio.create_task(toys.generate("hello", max_tokens=10))
        await asyncio.sleep(0.1)
        verifier.listed = True
        assert (await waiting).ids == expected(letters, PROMPT, 5, 10)


# ---------------------------------------------------------------- slow clients


def unread(toys: Cluster, tokens: int) -> Sequence:
    """A submitted request whose client reads nothing, 64 tokens behind at most."""
    request = Request("lazy", tuple(PROMPT), Sampling(seed=9), max_tokens=tokens)
    sequence = Sequence(request, toys.engine.catalog.models()[0], outlet=Outlet(64))
    toys.engine.submit(sequence)
    return sequence


async def test_a_client_that_does_not_read_stalls_nobody_and_rests() -> None:
    async with cluster() as toys:
        lazy = unread(toys, 300)
        await until(lambda: lazy.outlet.full)
        resting_at = lazy.committed_len
        quick = await toys.generate("hello", max_tokens=100)
        assert quick.ids == expected(letters, PROMPT, 5, 100)
        assert lazy.committed_len == resting_at < 100
        ids: list[int] = []
        while isinstance(event := await lazy.outlet.next(), Delta):
            ids += event.token_ids
        assert ids == expected(letters, PROMPT, 9, 300)


async def test_a_client_that_never_reads_again_is_given_up() -> None:
    verifier = ToyVerifier()
    async with cluster(verifier, options=by_fives(stall_seconds=0.1)) as toys:
        lazy = unread(toys, 300)
        await until(lambda: not toys.engine.active)
        await until(lambda: not verifier.open)
        await lazy.outlet.next()
        with pytest.raises(DeadlineExceeded, match="read nothing"):
            await lazy.outlet.next()


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_client_that_goes_without_reading_leaves_nothing_behind(how: str) -> None:
    """Its messages fill the connection, so that the call ends while one of them is being written."""
    verifier, drafter = ToyVerifier(), ToyDraft()
    narrow = [("grpc.http2.bdp_probe", 0)]  # the 64 KiB window stays
    async with (
        cluster(verifier, drafter, stream_buffer=128) as toys,
        grpc.aio.insecure_channel(toys.addresses[0], options=narrow) as channel,
    ):
        request = request_of("hello", {"logprobs": 20}, max_tokens=8000, request_id="lazy")
        stub = generation_pb2_grpc.RouterStub(channel)
        lazy = stub.Generate(request, timeout=4 if how == "deadline" else None)
        await lazy.read()
        sequence = toys.engine.active.get("lazy")
        assert sequence is not None
        await until(lambda: sequence.outlet.full)
        assert not sequence.ended
        if how == "cancel":
            lazy.cancel()
        await until(lambda: not toys.engine.active and not verifier.open and not drafter.attached)
        await assert_healthy(toys)


# ---------------------------------------------------------------- bad input


BAD: dict[str, tuple[pb.GenerateRequest, str]] = {
    "no prompt": (pb.GenerateRequest(), "prompt is missing"),
    "empty text": (pb.GenerateRequest(text=""), "prompt.text is empty"),
    "empty ids": (request_of([]), "prompt.token_ids is empty"),
    "empty chat": (pb.GenerateRequest(chat=pb.ChatMessages()), "prompt.chat.messages is empty"),
    "over-long prompt": (request_of([5] * 9000), "prompt: 9000 tokens; the limit is 8191"),
    "id out of range": (
        request_of([BOS, VOCAB]),
        rf"prompt.token_ids[1] is {VOCAB}; the vocabulary has ids 0 to {VOCAB - 1}",
    ),
    "temperature < 0": (request_of("a", {"temperature": -0.1}), "sampling.temperature is -0.1; it must be"),
    "temperature NaN": (request_of("a", {"temperature": float("nan")}), "sampling.temperature is nan"),
    "temperature infinite": (request_of("a", {"temperature": float("inf")}), "sampling.temperature is inf"),
    "top_p 0": (request_of("a", {"top_p": 0.0}), "sampling.top_p is 0.0; it must be in (0, 1]"),
    "top_p > 1": (request_of("a", {"top_p": 1.5}), "sampling.top_p is 1.5"),
    "top_p NaN": (request_of("a", {"top_p": float("nan")}), "sampling.top_p is nan"),
    "min_p 1": (request_of("a", {"min_p": 1.0}), "sampling.min_p is 1.0; it must be in [0, 1)"),
    "mode": (request_of("a", {"mode": 7}), "sampling.mode is 7"),
    "logprobs": (request_of("a", {"logprobs": 21}), "sampling.logprobs is 21; the limit is 20"),
    "max_tokens 0": (request_of("a", max_tokens=0), "max_tokens is 0; it must be 1 to 8190"),
    "max_tokens past the context": (request_of("a", max_tokens=8191), "max_tokens is 8191; it must be 1 to 8190"),
    "stop empty": (request_of("a", stop=["x", ""]), "stop[1]: 0 characters"),
    "stop too many": (request_of("a", stop=[str(n) for n in range(17)]), "stop: 17 strings; the limit is 16"),
    "stop id": (request_of("a", stop_token_ids=[VOCAB]), "stop_token_ids[0]"),
    "speculation": (request_of("a", speculation=9), "speculation is 9"),
    "speculation beside a policy": (request_of("a", speculation=9, policy="none"), "speculation is 9"),
    "policy": (
        request_of("a", policy="fastest"),
        "policy is 'fastest'; it must be none, fixed:N (N ≥ 0), threshold:X (0 ≤ X ≤ 1), adaptive, cap-accept",
    ),
    "policy without its number": (request_of("a", policy="fixed:"), "policy is 'fixed:'; it must be none, fixed:N"),
    "policy below zero": (request_of("a", policy="fixed:-1"), "policy is 'fixed:-1'"),
    "threshold past one": (request_of("a", policy="threshold:1.5"), "policy is 'threshold:1.5'"),
    "policy without costs": (request_of("a", policy="adaptive"), "policy 'adaptive': the model's workers have no cost"),
    "request_id": (request_of("a", request_id="x" * 129), "request_id: 129 characters; at most 128"),
}


async def test_bad_input_names_field_and_limit_and_hurts_nobody() -> None:
    async with cluster() as toys:
        for name, (request, words) in BAD.items():
            error = await refused(toys, request)
            assert error.code() is CODE.INVALID_ARGUMENT, name
            assert words in str(error.details()), name
        assert (await refused(toys, request_of("a", model="other"))).code() is CODE.NOT_FOUND
        assert toys.services[0]._admission.queued == 0
        await assert_healthy(toys)


async def test_what_no_worker_has_pages_for_is_refused() -> None:
    async with cluster(ToyVerifier(pages=4)) as toys:
        error = await refused(toys, request_of("hello", max_tokens=60))
        assert error.code() is CODE.INVALID_ARGUMENT
        assert "max_tokens is 60; it must be 1 to 58" in str(error.details())
        result = await toys.generate("hello", max_tokens=58)
        assert len(result.ids) == 58
        assert len((await toys.generate("hello")).ids) == 58  # the default is what fits


async def test_a_text_longer_than_a_message_may_be_is_refused() -> None:
    async with cluster() as toys:
        error = await refused(toys, request_of("a" * (4 << 20)))
        assert error.code() is CODE.RESOURCE_EXHAUSTED
        await assert_healthy(toys)


async def test_undecodable_bytes_are_an_invalid_argument() -> None:
    async with cluster() as toys:
        method: Any = toys.channels[0].unary_stream("/dspark.v1.Router/Generate")
        for data in (b"\xff\xff\xff", pb.GenerateRequest(text="ab").SerializeToString().replace(b"ab", b"\xc3\x28")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in method(data):
                    pass
            assert caught.value.code() is CODE.INVALID_ARGUMENT
        await assert_healthy(toys)
