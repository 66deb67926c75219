"""Servers and sessions over real loopback connections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.contextvars import get_contextvars

from dspark import errors
from dspark.messages import Opened, SequenceKey, WorkerLoad
from dspark.rpc import codec
from dspark.rpc.channel import connect, error_from_call
from dspark.rpc.options import RETRY_AFTER
from dspark.rpc.pieces import join, split
from dspark.rpc.probe import serving
from dspark.rpc.server import Server, serve
from dspark.rpc.session import Session, answer
from dspark.v1 import types_pb2, verifier_pb2, verifier_pb2_grpc


class Verifier(verifier_pb2_grpc.VerifierServicer):
    """Answers opens by sequence id: "slow" late, "die" by ending the stream, others at once, in any order."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen_request_ids: list[Any] = []

    async def Describe(self, request: Any, context: Any) -> verifier_pb2.DescribeVerifierResponse:
        self.seen_request_ids.append(get_contextvars().get("request_id"))
        if self.error:
            raise self.error
        return verifier_pb2.DescribeVerifierResponse(worker_id="w")

    async def FetchTokenizer(self, request: Any, context: Any) -> AsyncIterator[types_pb2.Piece]:
        for piece in split("tokenizer.json", bytes(3 << 20)):
            yield piece
        if self.error:
            raise self.error

    async def RegisterTap(self, requests: Any, context: Any) -> verifier_pb2.RegisterTapResponse:
        count = len([request async for request in requests])
        return verifier_pb2.RegisterTapResponse(tap_id=str(count))

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[verifier_pb2.VerifierReply]:
        async with aclosing(answer(requests, self._handle)) as replies:
            async for reply in replies:
                yield reply

    async def _handle(self, request: verifier_pb2.VerifierRequest) -> verifier_pb2.VerifierReply:
        opens = codec.decode(request.open)
        result: Any = [Opened(sequence.key, 7) for sequence in opens]
        match opens[0].key.sequence_id:
            case "slow":
                await asyncio.sleep(0.2)
            case "die":
                raise RuntimeError("bug")
            case "refused":
                result = errors.OutOfPages("no pages")
        return codec.verifier_reply(request.call_id, result, WorkerLoad(running=1))


def running(servicer: Verifier, **options: Any) -> Server:
    add = verifier_pb2_grpc.add_VerifierServicer_to_server
    return serve("127.0.0.1:0", [(add, servicer, "dspark.v1.Verifier")], **options)


@asynccontextmanager
async def session_at(address: str) -> AsyncIterator[Session[Any, Any]]:
    async with (
        connect(address) as channel,
        Session[Any, Any](verifier_pb2_grpc.VerifierStub(channel).Session, name="v1") as session,
    ):
        yield session


def open_request(name: str) -> verifier_pb2.VerifierRequest:
    return verifier_pb2.VerifierRequest(
        open=verifier_pb2.OpenSequences(sequences=[verifier_pb2.OpenSequence(sequence_id=name, epoch=1)])
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequest("max_tokens is 0, must be 1 or more"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.UnknownModel("x"), grpc.StatusCode.NOT_FOUND),
        (errors.Mismatch("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (errors.StaleMessage("x"), grpc.StatusCode.ABORTED),
        (errors.Unavailable("x"), grpc.StatusCode.UNAVAILABLE),
        (ZeroDivisionError("x"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_errors_become_statuses_also_inside_a_stream(error: Exception, status: grpc.StatusCode) -> None:
    async with running(Verifier(error)) as server, connect(f"127.0.0.1:{server.port}") as channel:
        stub = verifier_pb2_grpc.VerifierStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.Describe(verifier_pb2.DescribeVerifierRequest())
        call = stub.FetchTokenizer(verifier_pb2.FetchTokenizerRequest())
        assert [len((await call.read()).data) for _ in range(3)] == [1 << 20] * 3
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            await call.read()
        for caught in (unary, streamed):
            assert caught.value.code() is status
            assert str(error) in (caught.value.details() or "")


async def test_overload_carries_its_retry_hint() -> None:
    servicer = Verifier(errors.Overloaded("queue is full (64)", retry_after=1.25))
    async with running(servicer) as server, connect(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await verifier_pb2_grpc.VerifierStub(channel).Describe(verifier_pb2.DescribeVerifierRequest())
        assert list(caught.value.trailing_metadata() or ()) == [(RETRY_AFTER, "1250")]
        mapped = error_from_call(caught.value)
        assert isinstance(mapped, errors.Overloaded)
        assert mapped.retry_after == 1.25


async def test_undecodable_bytes_are_an_invalid_argument_and_harm_nothing() -> None:
    async with running(Verifier()) as server, connect(f"127.0.0.1:{server.port}") as channel:
        raw: Any = channel.unary_unary("/dspark.v1.Verifier/Describe")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(b"\xff\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "Describe" in (caught.value.details() or "")
        stream: Any = channel.stream_unary("/dspark.v1.Verifier/RegisterTap")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream(iter([b"", b"\x0a\xff"]))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        reply = await verifier_pb2_grpc.VerifierStub(channel).Describe(verifier_pb2.DescribeVerifierRequest())
        assert reply.worker_id == "w"


async def test_malformed_utf8_is_an_invalid_argument_also_inside_a_session() -> None:
    async with running(Verifier()) as server, connect(f"127.0.0.1:{server.port}") as channel:
        session: Any = channel.stream_stream("/dspark.v1.Verifier/Session")
        bad = open_request("ab").SerializeToString().replace(b"ab", b"\xc3\x28")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await session(iter([bad])).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_session_that_its_caller_ends_answers_everything_first() -> None:
    async with running(Verifier()) as server, connect(f"127.0.0.1:{server.port}") as channel:
        stub = verifier_pb2_grpc.VerifierStub(channel)
        replies = [reply async for reply in stub.Session(iter([open_request("slow"), open_request("s")]))]
        assert [reply.opened.sequences[0].sequence_id for reply in replies] == ["s", "slow"]


async def test_a_message_over_the_limit_names_the_limit() -> None:
    async with (
        running(Verifier(), max_message_bytes=1024) as server,
        connect(f"127.0.0.1:{server.port}") as channel,
    ):
        raw: Any = channel.unary_unary("/dspark.v1.Verifier/Describe")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(bytes(2000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1024" in (caught.value.details() or "")
        assert str(error_from_call(caught.value)) == "the message has 2000 bytes, the limit is 1024 bytes"


async def test_request_id_is_bound_for_the_call_only() -> None:
    servicer = Verifier()
    async with running(servicer) as server, connect(f"127.0.0.1:{server.port}") as channel:
        stub = verifier_pb2_grpc.VerifierStub(channel)
        await stub.Describe(verifier_pb2.DescribeVerifierRequest(), metadata=[("x-request-id", "r1")])
        await stub.Describe(verifier_pb2.DescribeVerifierRequest())
    assert servicer.seen_request_ids == ["r1", None]


async def test_health_and_reflection() -> None:
    async with running(Verifier(), serving=False) as server, connect(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="dspark.v1.Verifier")
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not await serving(f"127.0.0.1:{server.port}")
        await server.set_serving(True)
        assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        assert await serving(f"127.0.0.1:{server.port}")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        listed = [reply async for reply in stub.ServerReflectionInfo(iter(asked))]
        names = {service.name for service in listed[0].list_services_response.service}
        assert {"dspark.v1.Verifier", "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_a_readable_error() -> None:
    async with running(Verifier()) as server:
        with pytest.raises(errors.ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
            async with serve(f"127.0.0.1:{server.port}", []):
                pass


async def test_session_answers_out_of_order() -> None:
    async with running(Verifier()) as server, session_at(f"127.0.0.1:{server.port}") as session:
        order: list[str] = []

        async def ask(name: str) -> None:
            reply = await session.call(open_request(name), timeout=2.0)
            assert codec.decode(reply.opened) == (Opened(SequenceKey(name, 1), 7),)
            order.append(name)

        await asyncio.gather(ask("slow"), *(ask(f"s{i}") for i in range(20)))
        assert order[-1] == "slow"
        with pytest.raises(errors.OutOfPages, match="no pages"):
            await session.call(open_request("refused"))


async def test_a_late_or_cancelled_call_leaves_the_session_whole() -> None:
    async with running(Verifier()) as server, session_at(f"127.0.0.1:{server.port}") as session:
        with pytest.raises(errors.DeadlineExceeded, match="v1"):
            await session.call(open_request("slow"), timeout=0.05)
        for _ in range(20):
            doomed = asyncio.create_task(session.call(open_request("s")))
            await asyncio.sleep(0)
            doomed.cancel()
        reply = await session.call(open_request("fine"), timeout=2.0)
        assert reply.load.running == 1


async def test_a_broken_session_fails_everything_pending() -> None:
    async with running(Verifier()) as server, session_at(f"127.0.0.1:{server.port}") as session:
        pending = [asyncio.create_task(session.call(open_request("slow"))) for _ in range(3)]
        await asyncio.sleep(0.05)
        pending.append(asyncio.create_task(session.call(open_request("die"))))
        results = await asyncio.gather(*pending, return_exceptions=True)
        assert [type(result) for result in results] == [errors.Unavailable] * 4
        assert session.broken.is_set()
        with pytest.raises(errors.Unavailable, match="v1"):
            await session.call(open_request("s"))


async def test_a_stopping_server_answers_what_it_has_read_and_ends_its_sessions() -> None:
    async with running(Verifier(), grace=30) as server, session_at(f"127.0.0.1:{server.port}") as session:
        pending = [asyncio.create_task(session.call(open_request("slow"))) for _ in range(3)]
        await asyncio.sleep(0)  # they are sent
        await session.call(open_request("s"))  # and read
        await asyncio.wait_for(server.__aexit__(None, None, None), 2)
        assert [(await reply).load.running for reply in pending] == [1, 1, 1]
        await asyncio.wait_for(session.broken.wait(), 2)
        with pytest.raises(errors.Unavailable, match="the server is stopping"):
            await session.call(open_request("s"))


async def test_a_stopping_server_waits_for_no_session_longer_than_its_grace() -> None:
    async with running(Verifier(), grace=0.05) as server, session_at(f"127.0.0.1:{server.port}") as session:
        pending = asyncio.create_task(session.call(open_request("slow")))
        await asyncio.sleep(0)
        await session.call(open_request("s"))
        await asyncio.wait_for(server.__aexit__(None, None, None), 1)
        with pytest.raises(errors.Unavailable, match="the server is stopping"):
            await pending


async def test_a_session_with_nobody_there_is_unavailable() -> None:
    async with session_at("127.0.0.1:1") as session:
        with pytest.raises(errors.Unavailable, match="v1"):
            await session.call(open_request("s"), timeout=5.0)


async def test_pieces_travel_whole() -> None:
    async with running(Verifier()) as server, connect(f"127.0.0.1:{server.port}") as channel:
        stub = verifier_pb2_grpc.VerifierStub(channel)
        assert await join(stub.FetchTokenizer(verifier_pb2.FetchTokenizerRequest())) == {
            "tokenizer.json": bytes(3 << 20)
        }


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:-1"])
async def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(errors.ConfigError, match="is not host:port"):
        await serve(address, []).__aenter__()
