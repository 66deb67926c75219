"""A router that needs no model: it says what its prompts ask for."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from dspark import errors
from dspark.messages import ModelInfo, PositionLogprobs, TokenLogprob
from dspark.rpc.codec import encode
from dspark.rpc.server import Server, serve
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import generation_pb2_grpc, types_pb2

MODEL = ModelInfo("m", "gemma3", "f", "n", 512, 64, 4, 2048, (1,), 2)
LOGPROBS = PositionLogprobs(TokenLogprob(7, -0.5), (TokenLogprob(7, -0.5),))


class ScriptedRouter(generation_pb2_grpc.RouterServicer):
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
        try:  # a client may leave between any two events, not only in the pause
            yield pb.GenerateResponse(started=pb.Started(request_id="r1", prompt_tokens=3, seed=9, model="m"))
            yield pb.GenerateResponse(delta=pb.Delta(text="Hi", token_ids=[7], logprobs=[encode(LOGPROBS)]))
            if request.text == "slow":
                await asyncio.sleep(60)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
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


def running(router: ScriptedRouter) -> Server:
    return serve("127.0.0.1:0", [(generation_pb2_grpc.add_RouterServicer_to_server, router, "dspark.v1.Router")])
