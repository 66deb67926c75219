"""`python -m services.router`: reads settings, starts the router, and drains it on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import structlog
from prometheus_client import REGISTRY
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from dspark.errors import ConfigError, StartupError
from dspark.rpc.options import MAX_MESSAGE_BYTES
from dspark.rpc.server import Server, serve
from dspark.store import Directory
from dspark.telemetry import configure_logging, start_metrics_server
from dspark.v1 import generation_pb2_grpc
from services.router.admission import Admission
from services.router.engine import Engine
from services.router.metrics import Metrics
from services.router.options import Options, Patience
from services.router.scheduling.policies import FORMS, parse
from services.router.service import RouterService

_log = structlog.get_logger(__name__)


class Settings(BaseSettings):
    """Speculative decoding router: talks to clients, draft workers and verify workers."""

    model_config = SettingsConfigDict(
        env_prefix="DSPARK_",
        cli_parse_args=True,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_prog_name="python -m services.router",
        extra="ignore",
    )

    store: str = Field(description="Redis URL where workers announce themselves")
    listen: str = Field("127.0.0.1:50051", description="host:port for clients; port 0 picks one")
    advertise: str = Field("", description="host that logs name instead of the one in --listen")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus endpoint; 0 picks a port")
    metrics_host: str = Field("127.0.0.1", description="where the Prometheus endpoint listens")
    log_level: str = Field("info", description="debug, info, warning or error")

    policy: str = Field("adaptive", description=f"how verify lengths are chosen: {FORMS}")
    verify_length: int = Field(16, ge=0, le=64, description="draft tokens verified a round and sequence at most")
    explore: float = Field(1 / 64, ge=0, le=1, description="share of blocks verified whole to see what trimming hides")
    trace: Path | None = Field(None, description="file that gets a line of JSON a round")
    prefill_tokens: int = Field(128, ge=1, description="prompt positions in a step beside running sequences")
    max_running: int = Field(64, ge=1, description="sequences of this router that one verify worker may have")
    max_queue: int = Field(256, ge=1, description="requests that may wait; more are refused")
    rate_limit: int = Field(0, ge=0, description="requests a second and API key; 0: any number")

    draft_deadline: float = Field(0.5, gt=0, description="seconds that a round waits for drafts")
    feature_wait: float = Field(0.2, ge=0, description="seconds that a draft may wait for its features")
    draft_timeout: float = Field(10.0, gt=0, description="seconds until a silent draft worker is given up")
    step_deadline: float = Field(20.0, gt=0, description="seconds until a silent verify worker is given up")
    worker_wait: float = Field(30.0, gt=0, description="seconds that requests wait while no verify worker is there")
    stall_timeout: float = Field(120.0, gt=0, description="seconds until a client that reads nothing is given up")
    stream_buffer: int = Field(4096, ge=1, description="tokens that a client may be behind before its stream rests")
    drain_seconds: float = Field(30.0, ge=0, description="seconds that running requests have once told to stop")

    def options(self) -> Options:
        """What the engine goes by."""
        return Options(
            policy=parse(self.policy),
            verify_length=self.verify_length,
            explore=self.explore,
            trace=self.trace,
            prefill_tokens=self.prefill_tokens,
            max_running=self.max_running,
            step_seconds=self.step_deadline,
            worker_wait=self.worker_wait,
            stall_seconds=self.stall_timeout,
            patience=Patience(self.feature_wait, self.draft_deadline, self.draft_timeout),
        )


async def run(settings: Settings) -> None:
    """Serves until told to stop, then until running requests are done or `drain_seconds` have passed."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    options, metrics = settings.options(), Metrics(REGISTRY)
    with start_metrics_server(settings.metrics_port, host=settings.metrics_host) as exposed:
        async with Directory(settings.store) as directory, Engine(directory, options, metrics) as engine:
            service = RouterService(
                engine,
                Admission(max_queue=settings.max_queue, rate=settings.rate_limit),
                max_message_bytes=MAX_MESSAGE_BYTES,
                stream_buffer=settings.stream_buffer,
            )
            registration = (generation_pb2_grpc.add_RouterServicer_to_server, service, "dspark.v1.Router")
            async with serve(settings.listen, [registration]) as server:
                _log.info("ready", address=_address(settings, server), metrics_port=exposed.port)
                await _until_told(stop, engine)
                await _drain(server, service, engine, settings.drain_seconds)
    _log.info("stopped")


async def _until_told(stop: asyncio.Event, engine: Engine) -> None:
    """Returns at a signal. `ConfigError` where the policy means nothing with the workers that there are."""
    told, blind = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(engine.until_blind())
    await asyncio.wait([told, blind], return_when=asyncio.FIRST_COMPLETED)
    if blind.done():
        raise blind.result()
    blind.cancel()


async def _drain(server: Server, service: RouterService, engine: Engine, seconds: float) -> None:
    service.accepting = False
    await server.set_serving(serving=False)
    _log.info("draining", requests=len(engine.active), seconds=seconds)
    try:
        async with asyncio.timeout(seconds):
            await engine.active.until_none()
    except TimeoutError:
        _log.warning("requests cut off", requests=len(engine.active))


def _address(settings: Settings, server: Server) -> str:
    host, _, _ = settings.listen.rpartition(":")
    return f"{settings.advertise or host}:{server.port}"


def _settings() -> Settings:
    try:
        return Settings()  # type: ignore[call-arg]  # from flags and environment
    except SettingsError as error:
        raise ConfigError(str(error)) from error
    except ValidationError as error:
        faults = "; ".join(f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']}" for e in error.errors())
        raise ConfigError(faults) from error


def main() -> int:
    """Exit status: 0 after a drain, 1 where the router cannot start."""
    try:
        settings = _settings()
        configure_logging("router", level=settings.log_level)
        asyncio.run(run(settings))
    except StartupError as error:
        print(f"dspark router: {error}", file=sys.stderr)  # noqa: T201 - one readable line, not JSON
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
