"""The router's gRPC face: protobuf stops here. Calls become sequences, and sequences' events become messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc

import dspark
from dspark.errors import Cancelled, DeadlineExceeded, InvalidRequest, Unavailable
from dspark.rpc import codec
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import generation_pb2_grpc
from services.router.admission import Admission, Ticket
from services.router.engine import PROFILE_HINT, Engine
from services.router.finish import FinishReason
from services.router.links import Link
from services.router.outlet import Delta, Finished, Outlet
from services.router.requests import ServedModel
from services.router.sequences import Sequence
from services.router.validation import check, request_id_of, tokenize

__all__ = ["RouterService"]

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class RouterService(generation_pb2_grpc.RouterServicer):
    """Serves `dspark.v1.Router`.

    Args:
        engine: does the work.
        admission: says who may wait.
        max_message_bytes: told to clients.
        stream_buffer: tokens that a client may be behind before its sequence rests.
    """

    def __init__(
        self, engine: Engine, admission: Admission, *, max_message_bytes: int, stream_buffer: int = 4096
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._max_message_bytes = max_message_bytes
        self._stream_buffer = stream_buffer
        self.accepting = True

    # ------------------------------------------------------------ Generate

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        """Streams a completion; ends it everywhere when the client goes or its deadline passes."""
        if not self.accepting:
            raise Unavailable("the router is shutting down")
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = request_id_of(request, metadata.get("x-request-id", ""))
        deadline = _deadline(context)
        with self._admission.enter(_api_key(metadata)) as ticket:
            async with _until(deadline):
                sequence = await self._prepare(request, request_id, ticket)
            self._engine.submit(sequence)
            # Where the call ends while a message is being written, nothing is raised here.
            gone = Cancelled("the client has gone")
            context.add_done_callback(_call(lambda: self._engine.cancel(sequence, gone)))
            try:
                yield pb.GenerateResponse(started=_started(sequence))
                while True:
                    async with _until(deadline):
                        event = await sequence.outlet.next()
                    yield _response(event, sequence)
                    if isinstance(event, Finished):
                        return
            except DeadlineExceeded as error:
                self._engine.cancel(sequence, error)
                raise
            finally:
                self._engine.cancel(sequence, gone)  # no effect once it has ended

    async def _prepare(self, proto: pb.GenerateRequest, request_id: str, ticket: Ticket) -> Sequence:
        if request_id in self._engine.active:
            raise InvalidRequest(f"request_id {request_id!r} is that of a request still running")
        await ticket.pace()
        model = await self._engine.catalog.resolve(proto.model, wait=self._engine.options.worker_wait)
        prompt = await tokenize(proto, model)
        request = check(proto, prompt, request_id, model, self._room(model))
        if request.policy is not None and request.policy.needs_costs and not self._engine.knows_costs(model):
            raise InvalidRequest(f"policy {proto.policy!r}: the model's workers have no cost profile: {PROFILE_HINT}")
        outlet = Outlet(self._stream_buffer, whole=request.whole)
        return Sequence(request, model, outlet=outlet, on_opened=ticket.leave)

    def _room(self, model: ServedModel) -> int:
        pages = self._engine.capacity(model)
        return min(model.info.max_context, pages or model.info.max_context)

    # ------------------------------------------------------------ the rest

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Ends a running or queued request."""
        if not request.request_id:
            raise InvalidRequest("request_id is empty")
        return pb.AbortResponse(found=self._engine.abort(request.request_id, Cancelled("aborted on request")))

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        """How busy the router and its workers are."""
        return pb.GetLoadsResponse(
            running=self._engine.running,
            queued=self._admission.queued,
            queue_limit=self._admission.max_queue,
            workers=[
                *(_status(link, "draft") for link in self._engine.drafters.links.values()),
                *(_status(link, "verify") for link in self._engine.verifiers.links.values()),
            ],
        )

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """What is served, with which drafter."""
        models = self._engine.catalog.models()
        drafters = sorted({link.drafter.name for link in self._engine.drafters.links.values()})
        return pb.DescribeResponse(
            model=codec.encode(models[0].info) if models else None,
            drafter=", ".join(drafters),
            verify_length=self._engine.options.verify_length,
            max_message_bytes=self._max_message_bytes,
            version=dspark.__version__,
            policy=str(self._engine.options.policy),
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """The ids of a text and how the vocabulary spells them."""
        async with _until(_deadline(context)):
            model = await self._engine.catalog.resolve(request.model, wait=self._engine.options.worker_wait)
            ids = await model.tokenizer.encode_async(request.text, special_tokens=not request.no_special_tokens)
        response = pb.TokenizeResponse(token_ids=ids, pieces=model.tokenizer.pieces(ids))
        if response.ByteSize() > self._max_message_bytes:
            raise InvalidRequest(
                f"text: the answer has {response.ByteSize()} bytes, a message at most {self._max_message_bytes}"
            )
        return response


# ---------------------------------------------------------------- calls


def _deadline(context: Context) -> float | None:
    """On the loop's clock."""
    remaining = context.time_remaining()
    return None if remaining is None else asyncio.get_running_loop().time() + remaining


@asynccontextmanager
async def _until(deadline: float | None) -> AsyncIterator[None]:
    """`asyncio.timeout_at` that raises our error."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the call's deadline has passed") from error


def _call(function: Callable[[], None]) -> Any:
    """The function as a callback of a finished call, whose argument says nothing new."""
    return lambda _: function()


def _api_key(metadata: Mapping[str, str]) -> str:
    """Who calls, as far as the rate limit is concerned; all callers without a key are one."""
    return metadata.get("x-api-key") or metadata.get("authorization", "").removeprefix("Bearer ")


# ---------------------------------------------------------------- messages


def _started(sequence: Sequence) -> pb.Started:
    request = sequence.request
    return pb.Started(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt),
        seed=request.sampling.seed,
        model=sequence.model.info.name,
    )


def _response(event: Delta | Finished, sequence: Sequence) -> pb.GenerateResponse:
    if isinstance(event, Finished):
        return pb.GenerateResponse(finished=_finished(event, sequence))
    logprobs = [codec.encode(entry) for entry in event.logprobs]
    return pb.GenerateResponse(delta=pb.Delta(text=event.text, token_ids=event.token_ids, logprobs=logprobs))


def _finished(event: Finished, sequence: Sequence) -> pb.Finished:
    return pb.Finished(
        reason=_REASONS[event.reason],
        usage=pb.Usage(
            prompt_tokens=len(sequence.request.prompt),
            cached_tokens=event.cached_tokens,
            completion_tokens=event.completion_tokens,
        ),
        timings=pb.Timings(
            queue_seconds=event.queue_seconds,
            first_token_seconds=event.first_token_seconds,
            total_seconds=event.total_seconds,
        ),
        speculation=_speculation(event),
        stop_match=event.stop_match,
    )


def _speculation(event: Finished) -> pb.SpeculationCounts:
    counts = event.counts
    return pb.SpeculationCounts(
        enabled=event.speculation,
        rounds=counts.rounds,
        drafted=counts.drafted,
        verified=counts.verified,
        accepted=counts.accepted,
        missed_rounds=counts.missed_rounds,
        verified_at=counts.verified_at,
        accepted_at=counts.accepted_at,
        drafter=event.drafter,
        alternatives=counts.alternatives,
        turned=counts.turned,
    )


def _status(link: Link, role: str) -> pb.WorkerStatus:
    return pb.WorkerStatus(
        worker_id=link.worker_id,
        role=role,
        address=link.address,
        load=codec.encode(link.load),
        reading_age_seconds=link.load_age,
        rounds=link.rounds,
        tokens=link.tokens,
    )
