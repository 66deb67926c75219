"""A service's gRPC server: limits, error statuses, health and reflection. Knows no service's logic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dspark.errors import ConfigError
from dspark.rpc.interceptor import ErrorInterceptor
from dspark.rpc.options import MAX_MESSAGE_BYTES, check_address, server_options

__all__ = ["Server", "Servicer", "serve"]

Servicer = tuple[Callable[[Any, Any], None], Any, str]
"""(the generated `add_X_to_server`, the servicer, the service's full name such as "dspark.v1.Router")."""


class Server:
    """A running gRPC server. `port` is the bound one, also where port 0 was asked for."""

    def __init__(
        self, address: str, servicers: Sequence[Servicer], *, max_message_bytes: int, grace: float, serving: bool
    ) -> None:
        self._address = address
        self._servicers = servicers
        self._grace = grace
        self._serving = serving
        self._calls = ErrorInterceptor()
        self._server = grpc.aio.server(interceptors=[self._calls], options=server_options(max_message_bytes))
        self._health = health.aio.HealthServicer()
        self.port = 0

    async def __aenter__(self) -> Self:
        for add, servicer, _ in self._servicers:
            add(servicer, self._server)
        names = [name for _, _, name in self._servicers]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        await self.set_serving(self._serving)
        self.port = self._bind()
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._health.enter_graceful_shutdown()
        await self._calls.end_sessions(self._grace)
        await self._server.stop(self._grace)
        await self._calls.wait(self._grace)

    async def set_serving(self, serving: bool) -> None:
        """What health checks of the whole server and of each service answer from now on."""
        status = health_pb2.HealthCheckResponse
        for name in ("", *(name for _, _, name in self._servicers)):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await self._server.wait_for_termination()

    def _bind(self) -> int:
        check_address(self._address)
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._address}: in use, or not of this machine") from error
        if port == 0:
            raise ConfigError(f"cannot listen on {self._address}: the address is in use or not of this machine")
        return int(port)


def serve(
    address: str,
    servicers: Sequence[Servicer],
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    grace: float = 1.0,
    serving: bool = True,
) -> Server:
    """A server for `async with`: listens on `host:port` (port 0: a free one), with health and reflection.

    Once the block is left, sessions (calls that stream both ways) read no more and end as they have answered what they
    had read; they and then the others may run `grace` seconds more. With `serving=False` health checks fail until
    `set_serving(True)`. `ConfigError` where the address cannot be bound.
    """
    return Server(address, servicers, max_message_bytes=max_message_bytes, grace=grace, serving=serving)
