"""Links to the workers that the store lists."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dspark.rpc import codec
from dspark.rpc.channel import connect
from dspark.rpc.session import Session
from dspark.store import WorkerRecord
from dspark.v1 import draft_pb2, draft_pb2_grpc, verifier_pb2, verifier_pb2_grpc
from services.router.links import CALL_SECONDS, DraftLink, VerifierLink

__all__ = ["connect_draft", "connect_verifier"]

CONNECT_SECONDS = 5.0


@asynccontextmanager
async def connect_verifier(record: WorkerRecord) -> AsyncIterator[VerifierLink]:
    """A link to the verify worker of a store record, while the block runs. Raises `grpc.aio.AioRpcError` as well."""
    async with connect(record.address) as channel:
        stub = verifier_pb2_grpc.VerifierStub(channel)
        about = await stub.Describe(verifier_pb2.DescribeVerifierRequest(), timeout=CONNECT_SECONDS)
        session: Session[verifier_pb2.VerifierRequest, verifier_pb2.VerifierReply]
        session = Session(stub.Session, name=record.worker_id)
        async with session:
            yield VerifierLink(
                record.worker_id,
                record.address,
                session,
                codec.decode(about.load),
                model=codec.decode(about.model),
                page_size=about.page_size,
                max_step_tokens=about.max_step_tokens,
                fetch_tokenizer=lambda: stub.FetchTokenizer(verifier_pb2.FetchTokenizerRequest(), timeout=CALL_SECONDS),
            )


@asynccontextmanager
async def connect_draft(record: WorkerRecord) -> AsyncIterator[DraftLink]:
    """A link to the draft worker of a store record, while the block runs. Raises `grpc.aio.AioRpcError` as well."""
    async with connect(record.address) as channel:
        stub = draft_pb2_grpc.DraftStub(channel)
        about = await stub.Describe(draft_pb2.DescribeDraftRequest(), timeout=CONNECT_SECONDS)
        session: Session[draft_pb2.DraftRequest, draft_pb2.DraftReply]
        session = Session(stub.Session, name=record.worker_id)
        async with session:
            drafter = codec.decode(about.drafter)
            yield DraftLink(record.worker_id, record.address, session, codec.decode(about.load), drafter=drafter)
