"""`python -m dspark.rpc.probe HOST:PORT`: exit status 0 while the service there serves."""

from __future__ import annotations

import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspark.rpc.channel import connect

__all__ = ["serving"]


async def serving(address: str, *, seconds: float = 1.0) -> bool:
    """Whether the server at `host:port` answers within so many seconds that it serves."""
    async with connect(address) as channel:
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(serving(sys.argv[1], seconds=4.0)) else 1)
