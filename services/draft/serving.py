"""A draft worker's life: load, warm up, serve, tell the store, drain, end. Puts the parts together."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator

import structlog
import torch
from prometheus_client import CollectorRegistry

from dspark.errors import ConfigError
from dspark.kernels import select_kernels
from dspark.messages import AttachSequence, DrafterInfo, ProposeItem, Sampling, SequenceKey
from dspark.models.drafters import DSparkDrafter, load_drafter
from dspark.models.pull import resolve_model
from dspark.rpc.server import Servicer, serve
from dspark.sampling import DraftChooser
from dspark.store import Directory, Heartbeat, Usage, WorkerRecord, check_store, cpu_usage, gpu_usage
from dspark.telemetry import start_metrics_server
from dspark.v1.draft_pb2_grpc import add_DraftServicer_to_server
from services.draft.engine import DraftEngine
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer
from services.draft.service import DraftService
from services.draft.settings import Settings
from services.draft.worker import DraftWorker

__all__ = ["prepare", "serve_until_told"]

_log = structlog.get_logger(__name__)


async def serve_until_told(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `StartupError` where it cannot start."""
    check_store(settings.store)  # before the long part
    stop = _stop_signal()
    engine, offer = prepare(settings)
    metrics = DraftMetrics(CollectorRegistry())
    with start_metrics_server(settings.metrics_port, host=settings.metrics_host, registry=metrics.registry) as shown:
        async with (
            Directory(settings.store) as directory,
            DraftWorker(
                engine,
                offer,
                metrics=metrics,
                present=lambda: _verifiers(directory, offer),
                connect_seconds=settings.connect_seconds,
            ) as worker,
        ):
            await _serve(settings, worker, offer.drafter, shown.port, stop)


async def _serve(
    settings: Settings, worker: DraftWorker, drafter: DrafterInfo, metrics_port: int, stop: asyncio.Event
) -> None:
    service = DraftService(worker, worker_id=settings.worker_id, drafter=drafter)
    servicer: Servicer = (add_DraftServicer_to_server, service, "dspark.v1.Draft")
    async with serve(settings.listen, [servicer]) as server:
        address = _address(settings, server.port)

        def record() -> WorkerRecord:
            return WorkerRecord(
                worker_id=settings.worker_id,
                role="draft",
                address=address,
                metrics_port=metrics_port,
                drafter=drafter,
                load=worker.load(),
            )

        with Heartbeat(settings.store, record, usage=_usage(settings)) as beat:
            _log.info("ready", address=address, metrics_port=metrics_port, drafter=drafter.name)
            await stop.wait()
            _log.info("draining", sequences=worker.load().running, seconds=settings.drain_seconds)
            worker.draining = True
            beat.beat()
            await worker.drain(settings.drain_seconds)
            _log.info("stopping", sequences=worker.load().running)


def _verifiers(directory: Directory, offer: TapOffer) -> Iterator[str]:
    """Addresses of the verify workers whose target this drafter fits."""
    for record in directory.workers():
        if record.role == "verify" and record.model is not None and offer.fits(record.model):
            yield record.address


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


# ------------------------------------------------------------ parts


def prepare(settings: Settings) -> tuple[DraftEngine, TapOffer]:
    """The engine, warm, and what verify workers are told. `StartupError` where a model or the device is no good."""
    began = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    target = resolve_model(settings.target) if settings.target else None
    drafter = load_drafter(settings.drafter, target_path=target, dtype=getattr(torch, settings.dtype), device=device)
    offer = TapOffer.of(drafter, settings.drafter)
    engine = DraftEngine(
        drafter,
        DraftChooser(draft_top_k=settings.draft_top_k),
        select_kernels(settings.kernels, device),
        context_positions=settings.context_positions,
    )
    _let_go(drafter)
    _warm_up(engine, drafter.config.hidden_size)
    _log.info("drafter loaded", drafter=offer.drafter.name, seconds=round(time.perf_counter() - began, 2))
    return engine, offer


def _let_go(drafter: DSparkDrafter) -> None:
    """Free what the engine has arranged anew, or the verify worker computes."""
    del drafter.fc, drafter.layers
    drafter.head_weight = drafter.head_weight.new_empty(0)


def _warm_up(engine: DraftEngine, feature_size: int) -> None:
    """Draft for nobody, so that the first request does not pay for what is set up on first use."""
    keys = [SequenceKey(f"warm-up-{number}", 0) for number in range(2)]
    for key in keys:
        engine.attach(AttachSequence(key, "", Sampling(), 8))
        engine.extend(key, torch.zeros(4, feature_size))
    for count in (1, 2):
        engine.propose([ProposeItem(key, 5, 0, 1024) for key in keys[:count]])
    engine.detach(keys)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch sees no GPU")
    return device


def _usage(settings: Settings) -> Callable[[], Usage]:
    device = _device(settings.device)
    return gpu_usage(device.index or 0) if device.type == "cuda" else cpu_usage()


def _address(settings: Settings, port: int) -> str:
    """Where others reach us: a listening address of all interfaces is nobody's address."""
    host = settings.listen.rpartition(":")[0]
    if host in ("0.0.0.0", "[::]", ""):  # noqa: S104 - recognised, not bound
        host = socket.gethostname()
    return f"{settings.advertise or host}:{port}"
