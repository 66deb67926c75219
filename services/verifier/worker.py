"""A verify worker's life: load, warm up, serve, tell the store, drain, end. Puts the parts together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog
import torch
from prometheus_client import CollectorRegistry

from dspark import program
from dspark.costs import CostModel, CostProfile, Refined
from dspark.costs.files import loading
from dspark.devices import pick_device, pick_numerics, processor_name, usage_of
from dspark.errors import InternalError
from dspark.kernels import team
from dspark.messages import ModelInfo
from dspark.models.fingerprint import cost_fingerprint, numerics_fingerprint
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel, load_target
from dspark.rpc.server import Servicer, serve
from dspark.store import Heartbeat, WorkerRecord
from dspark.telemetry import start_metrics_server
from dspark.v1.verifier_pb2_grpc import add_VerifierServicer_to_server
from services.verifier.engine import EngineSettings, VerifyEngine
from services.verifier.metrics import Metrics
from services.verifier.profiling import profile
from services.verifier.service import VerifierService
from services.verifier.settings import Settings
from services.verifier.step import warm_up
from services.verifier.thread import EngineThread
from services.verifier.tokenizer_files import chat_template, tokenizer_files

__all__ = ["drain", "ending", "kept_costs", "prepare", "record_of", "serve_until_told", "servicer"]

_log = structlog.get_logger(__name__)


async def serve_until_told(settings: Settings, path: Path) -> None:
    """Serve the model at `path` until SIGTERM or SIGINT, then drain. `StartupError` where it cannot start."""
    stop = program.stop_signal()
    with contextlib.ExitStack() as stack:
        executor = stack.enter_context(program.one_thread("engine"))
        engine, files = await asyncio.get_running_loop().run_in_executor(executor, prepare, settings, path)
        hand_over = asyncio.get_running_loop().call_soon_threadsafe
        thread = stack.enter_context(EngineThread(engine, on_end=ending(stop), hand_over=hand_over, executor=executor))
        metrics = stack.enter_context(
            start_metrics_server(settings.metrics_port, host=settings.metrics_host, registry=engine.metrics.registry)
        )
        engine.metrics.follow(thread.load)
        async with serve(settings.listen, [servicer(settings, thread, files)]) as server:
            address = program.address_of(settings.listen, settings.advertise, server.port)
            record = record_of(settings, thread, address, metrics.port)
            usage = usage_of(pick_device(settings.device))
            with Heartbeat(settings.store, record, usage=usage, profile=kept_costs(engine)) as beat:
                _log.info("ready", address=address, metrics_port=metrics.port, model=engine.info.name)
                await stop.wait()
                await drain(thread, beat, settings.drain_seconds)


def ending(stop: asyncio.Event) -> Callable[[], None]:
    """Sets the event, of this event loop, from whatever thread it is called in."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        loop.call_soon_threadsafe(stop.set)

    return call


def servicer(settings: Settings, thread: EngineThread, files: dict[str, bytes]) -> Servicer:
    """The worker's face, for its server."""
    service = VerifierService(
        thread,
        worker_id=settings.worker_id,
        page_size=settings.page_size,
        files=files,
        feature_queue_bytes=settings.feature_queue_mib << 20,
    )
    return (add_VerifierServicer_to_server, service, "dspark.v1.Verifier")


async def drain(thread: EngineThread, beat: Heartbeat, seconds: float) -> None:
    """Open nothing new and wait until the routers have moved or finished what is open.

    `InternalError` where the engine's thread has ended without being told to.
    """
    if thread.failed:
        raise InternalError("the engine's thread has ended")
    thread.engine.draining = True
    beat.beat()
    _log.info("draining", sequences=thread.load().running, seconds=seconds)
    await asyncio.to_thread(thread.wait_empty, seconds)
    _log.info("stopping", sequences=thread.load().running)


# ------------------------------------------------------------ parts


def prepare(settings: Settings, path: Path) -> tuple[VerifyEngine, dict[str, bytes]]:
    """The engine, warm, and the files that routers fetch."""
    began = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    numerics = pick_numerics(settings.kernels, settings.dtype, device, weights=settings.weights)
    compiled = numerics.kernels.implementation == "llvm"
    bound = settings.bind_threads and compiled and team.settle()
    own = EngineSettings(max_step_tokens=settings.max_step_tokens, noise_candidates=settings.noise_candidates)
    with loading():
        model = load_target(path, dtype=numerics.dtype, device=device, kernels=numerics.kernels)
        cache = KVCache(
            model.config,
            pages=settings.pages,
            page_size=settings.page_size,
            dtype=model.kept_dtype,
            device=device,
            max_step_rows=settings.max_step_tokens,
            prefix_cache=settings.prefix_cache,
        )
        warm_up(model, cache, settings.noise_candidates)
    info = _info(settings, model, path)
    engine = VerifyEngine(model, cache, own, info=info, metrics=Metrics(CollectorRegistry()))
    _log.info(
        "model loaded",
        model=info.name,
        path=str(path),
        kernels=numerics.kernels.name,
        bound=bound,
        seconds=round(time.perf_counter() - began, 2),
    )
    engine.costs = _costs(settings, model, cache, own, info, bound=bound)
    return engine, tokenizer_files(path, info)


def _info(settings: Settings, model: TargetModel, path: Path) -> ModelInfo:
    """What is said of the model, with all that its numbers depend on here."""
    numerics = numerics_fingerprint(
        model.dtype,
        model.kernels,
        model.device,
        model=model.info.model_fingerprint,
        noise_candidates=settings.noise_candidates,
        paired_positions=settings.page_size % 2 == 0,  # attention multiplies them so where it can
        processor=processor_name(),
    )
    return replace(model.info, numerics_fingerprint=numerics, has_chat_template=chat_template(path) is not None)


def _costs(
    settings: Settings, model: TargetModel, cache: KVCache, own: EngineSettings, info: ModelInfo, *, bound: bool
) -> Refined | None:
    """What steps cost, kept or measured; the number of threads counts and is set by now."""
    fingerprint = cost_fingerprint(
        "verify",
        info.model_fingerprint,
        dtype=model.dtype,
        kernels=model.kernels,
        device=model.device,
        bound=bound,
        page_size=settings.page_size,
        max_step_tokens=own.max_step_tokens,
        noise_candidates=own.noise_candidates,
    )
    known = profile(
        model,
        cache,
        own,
        info,
        fingerprint=fingerprint,
        choice=settings.profile,
        budget_seconds=settings.profile_seconds,
    )
    return Refined(CostModel(known)) if known is not None else None


def record_of(settings: Settings, thread: EngineThread, address: str, metrics_port: int) -> Callable[[], WorkerRecord]:
    """What the store is told, time and again."""
    known = kept_costs(thread.engine)

    def record() -> WorkerRecord:
        return WorkerRecord(
            worker_id=settings.worker_id,
            role="verify",
            address=address,
            metrics_port=metrics_port,
            model=thread.engine.info,
            load=thread.load(),
            tap_ids=thread.engine.tap_ids,
            page_size=settings.page_size,
            max_step_tokens=settings.max_step_tokens,
            profile_fingerprint=known.fingerprint if known is not None else "",
        )

    return record


def kept_costs(engine: VerifyEngine) -> CostProfile | None:
    """What steps cost, as measured at some start here; None where that is not known."""
    return engine.costs.model.profile if engine.costs is not None else None
