"""Logs and metrics as every service has them: JSON lines on stderr, Prometheus over HTTP. Defines no metrics."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, start_http_server

from dspark.errors import ConfigError

__all__ = ["MetricsServer", "configure_logging", "request_context", "start_metrics_server"]


def configure_logging(service: str, *, level: str = "info", **bound: Any) -> None:
    """From here on every log line of this process is one JSON object on stderr.

    Each has `timestamp` (ISO, UTC), `level`, `event`, `service`, the values in `bound` (such as worker_id) and, inside
    `request_context` or a call that carried one, `request_id`. Warnings and the standard library's loggers are
    written alike. `ConfigError` for an unknown level.
    """
    threshold = logging.getLevelNamesMapping().get(level.upper())
    if threshold is None:
        raise ConfigError(f"log level {level!r} is none of debug, info, warning, error")
    facts = {"service": service, **bound}

    def add_facts(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**facts, **event}

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        add_facts,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, *_rendering()],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    _configure_standard_library(shared, threshold)


def _rendering() -> list[structlog.typing.Processor]:
    return [
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(default=str),
    ]


def _configure_standard_library(shared: list[structlog.typing.Processor], threshold: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering()],
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(threshold, logging.WARNING))  # other libraries' chatter is not ours to log
    logging.captureWarnings(True)


@contextmanager
def request_context(request_id: str, **bound: Any) -> Iterator[None]:
    """Log lines inside, also of tasks started inside, carry the request's id."""
    with structlog.contextvars.bound_contextvars(request_id=request_id, **bound):
        yield


class MetricsServer:
    """A Prometheus endpoint at `http://host:port/metrics`, for `with`."""

    def __init__(self, port: int, host: str, registry: CollectorRegistry) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror or error}") from error
        self.port = int(self._server.server_port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops answering and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics_server(
    port: int = 0, *, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY
) -> MetricsServer:
    """Serves the registry's metrics in a background thread; port 0 picks a free one, told by `.port`.

    `ConfigError` where the port is taken.
    """
    return MetricsServer(port, host, registry)
