"""A draft worker's life: load, warm up, serve, tell the store, drain, end. Puts the parts together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import torch
from prometheus_client import CollectorRegistry

from dspark import program
from dspark.costs import CostModel, CostProfile, Refined
from dspark.costs.files import loading
from dspark.devices import Numerics, pick_device, pick_numerics, usage_of
from dspark.kernels import team
from dspark.messages import AttachSequence, DrafterInfo, ProposeItem, Sampling, SequenceKey
from dspark.models.drafters import Drafter
from dspark.models.fingerprint import cost_fingerprint
from dspark.models.pull import resolve_model
from dspark.rpc.server import Servicer, serve
from dspark.sampling import DraftChooser
from dspark.store import Directory, Heartbeat, WorkerRecord, check_store
from dspark.telemetry import start_metrics_server
from dspark.v1.draft_pb2_grpc import add_DraftServicer_to_server
from services.draft.architectures import load
from services.draft.engine import DraftEngine
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer
from services.draft.profiling import profile
from services.draft.service import DraftService
from services.draft.settings import Settings
from services.draft.worker import DraftWorker

__all__ = ["drain", "kept_costs", "prepare", "record_of", "serve_until_told", "servicer", "verifiers"]

_log = structlog.get_logger(__name__)


async def serve_until_told(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `StartupError` where it cannot start."""
    check_store(settings.store)  # before the long part
    stop = program.stop_signal()
    metrics = DraftMetrics(CollectorRegistry())
    with (
        program.one_thread("draft-engine") as executor,
        start_metrics_server(settings.metrics_port, host=settings.metrics_host, registry=metrics.registry) as shown,
    ):
        engine, offer = await asyncio.get_running_loop().run_in_executor(executor, prepare, settings)
        async with (
            Directory(settings.store) as directory,
            DraftWorker(
                engine,
                offer,
                metrics=metrics,
                present=lambda: verifiers(directory, offer),
                connect_seconds=settings.connect_seconds,
                executor=executor,
            ) as worker,
        ):
            await _serve(settings, worker, offer.drafter, kept_costs(engine), shown.port, stop)


async def _serve(
    settings: Settings,
    worker: DraftWorker,
    drafter: DrafterInfo,
    known: CostProfile | None,
    metrics_port: int,
    stop: asyncio.Event,
) -> None:
    async with serve(settings.listen, [servicer(settings, worker, drafter)]) as server:
        address = program.address_of(settings.listen, settings.advertise, server.port)
        record = record_of(settings, worker, drafter, known, address, metrics_port)
        usage = usage_of(pick_device(settings.device))
        with Heartbeat(settings.store, record, usage=usage, profile=known) as beat:
            _log.info("ready", address=address, metrics_port=metrics_port, drafter=drafter.name)
            await stop.wait()
            await drain(worker, beat, settings.drain_seconds)


def servicer(settings: Settings, worker: DraftWorker, drafter: DrafterInfo) -> Servicer:
    """The worker's face, for its server."""
    service = DraftService(worker, worker_id=settings.worker_id, drafter=drafter)
    return (add_DraftServicer_to_server, service, "dspark.v1.Draft")


def record_of(
    settings: Settings,
    worker: DraftWorker,
    drafter: DrafterInfo,
    known: CostProfile | None,
    address: str,
    metrics_port: int,
) -> Callable[[], WorkerRecord]:
    """What the store is told, time and again."""

    def record() -> WorkerRecord:
        return WorkerRecord(
            worker_id=settings.worker_id,
            role="draft",
            address=address,
            metrics_port=metrics_port,
            drafter=drafter,
            load=worker.load(),
            profile_fingerprint=known.fingerprint if known is not None else "",
        )

    return record


async def drain(worker: DraftWorker, beat: Heartbeat, seconds: float) -> None:
    """Attach nothing new and wait until the routers have moved or finished what is attached."""
    _log.info("draining", sequences=worker.load().running, seconds=seconds)
    worker.draining = True
    beat.beat()
    await worker.drain(seconds)
    _log.info("stopping", sequences=worker.load().running)


def kept_costs(engine: DraftEngine) -> CostProfile | None:
    """What drafting costs, as measured at some start here; None where that is not known."""
    return engine.costs.model.profile if engine.costs is not None else None


def verifiers(directory: Directory, offer: TapOffer) -> Iterator[str]:
    """Addresses of the verify workers whose target this drafter fits."""
    for record in directory.workers():
        if record.role == "verify" and record.model is not None and offer.fits(record.model):
            yield record.address


# ------------------------------------------------------------ parts


def prepare(settings: Settings) -> tuple[DraftEngine, TapOffer]:
    """The engine, warm, and what verify workers are told. `StartupError` where a model or the device is no good."""
    began = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    target = resolve_model(settings.target) if settings.target else None  # what it starts must have every core
    numerics = pick_numerics(settings.kernels, settings.dtype, device, weights=settings.draft_weights)
    compiled = numerics.kernels.implementation == "llvm"
    bound = settings.bind_threads and compiled and team.settle()
    with loading():
        engine, offer = _load(settings, target, numerics, device)
    seconds = round(time.perf_counter() - began, 2)
    _log.info("drafter loaded", drafter=offer.drafter.name, kernels=numerics.kernels.name, bound=bound, seconds=seconds)
    engine.costs = _costs(settings, engine, offer, numerics, device, bound=bound)
    return engine, offer


def _load(
    settings: Settings, target: Path | None, numerics: Numerics, device: torch.device
) -> tuple[DraftEngine, TapOffer]:
    drafter = load(settings.drafter, target, dtype=numerics.dtype, device=device)
    offer = TapOffer.of(drafter, settings.drafter)
    engine = DraftEngine(
        drafter,
        DraftChooser(draft_top_k=settings.draft_top_k, bits=numerics.kernels.keyed_bits),
        numerics.kernels,
        context_positions=settings.context_positions,
        lookup=settings.lookup,
    )
    if isinstance(drafter, Drafter):
        _let_go(drafter)
    _warm_up(engine, offer.row_bytes // 2)
    return engine, offer


def _costs(
    settings: Settings, engine: DraftEngine, offer: TapOffer, numerics: Numerics, device: torch.device, *, bound: bool
) -> Refined | None:
    """What drafting costs, kept or measured; the number of threads counts and is set by now."""
    drafter = offer.drafter
    fingerprint = cost_fingerprint(
        "draft",
        drafter.fingerprint or drafter.name,
        dtype=numerics.dtype,
        kernels=numerics.kernels,
        device=device,
        bound=bound,
        target=drafter.model_fingerprint,
        vocab_size=drafter.vocab_size,
        draft_top_k=settings.draft_top_k,
    )
    known = profile(
        engine,
        offer.row_bytes // 2,
        fingerprint=fingerprint,
        choice=settings.profile,
        budget_seconds=settings.profile_seconds,
    )
    return Refined(CostModel(known)) if known is not None else None


def _let_go(drafter: Drafter) -> None:
    """Free what the engine has arranged anew, or the verify worker computes."""
    del drafter.fc, drafter.layers
    drafter.head_weight = drafter.head_weight.new_empty(0)


def _warm_up(engine: DraftEngine, feature_size: int) -> None:
    """Draft for nobody, so that the first request does not pay for what is set up on first use."""
    keys = [SequenceKey(f"warm-up-{number}", 0) for number in range(2)]
    for key in keys:
        engine.attach(AttachSequence(key, "", Sampling(), 8))
        engine.extend(key, torch.zeros(4, feature_size), [0] * 4)
    for count in (1, 2):
        for _ in range(3):  # what layers do is noted the second time, and repeated from the third
            engine.propose([ProposeItem(key, 5, 0, 1024) for key in keys[:count]])
    engine.detach(keys)
