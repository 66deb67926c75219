"""A verify worker's life: load, warm up, serve, tell the store, drain, end. Puts the parts together."""

from __future__ import annotations

import asyncio
import contextlib
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import structlog
import torch
from prometheus_client import CollectorRegistry

from dspark import program
from dspark.devices import pick_device, usage_of
from dspark.errors import InternalError
from dspark.kernels import select_kernels
from dspark.models.fingerprint import numerics_fingerprint
from dspark.models.kv_cache import KVCache
from dspark.models.target import load_target
from dspark.rpc.server import Servicer, serve
from dspark.store import Heartbeat, WorkerRecord
from dspark.telemetry import start_metrics_server
from dspark.v1.verifier_pb2_grpc import add_VerifierServicer_to_server
from services.verifier.engine import EngineSettings, VerifyEngine
from services.verifier.metrics import Metrics
from services.verifier.service import VerifierService
from services.verifier.settings import Settings
from services.verifier.step import warm_up
from services.verifier.thread import EngineThread
from services.verifier.tokenizer_files import chat_template, tokenizer_files

__all__ = ["prepare", "serve_until_told"]

_log = structlog.get_logger(__name__)


async def serve_until_told(settings: Settings, path: Path) -> None:
    """Serve the model at `path` until SIGTERM or SIGINT, then drain. `StartupError` where it cannot start."""
    stop = program.stop_signal()
    engine, files = prepare(settings, path)
    with contextlib.ExitStack() as stack:
        thread = stack.enter_context(EngineThread(engine, on_end=_from_another_thread(stop.set)))
        metrics = stack.enter_context(
            start_metrics_server(settings.metrics_port, host=settings.metrics_host, registry=engine.metrics.registry)
        )
        engine.metrics.follow(thread.load)
        service = VerifierService(
            thread,
            worker_id=settings.worker_id,
            page_size=settings.page_size,
            files=files,
            feature_queue_bytes=settings.feature_queue_mib << 20,
        )
        servicer: Servicer = (add_VerifierServicer_to_server, service, "dspark.v1.Verifier")
        async with serve(settings.listen, [servicer]) as server:
            address = program.address_of(settings.listen, settings.advertise, server.port)
            record = _record(settings, thread, address, metrics.port)
            with Heartbeat(settings.store, record, usage=usage_of(pick_device(settings.device))) as beat:
                _log.info("ready", address=address, metrics_port=metrics.port, model=engine.info.name)
                await stop.wait()
                if thread.failed:
                    raise InternalError("the engine's thread has ended")
                await _drain(thread, beat, settings.drain_seconds)


def _from_another_thread(function: Callable[[], None]) -> Callable[[], None]:
    """The function, run on this event loop wherever it is called."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        loop.call_soon_threadsafe(function)

    return call


async def _drain(thread: EngineThread, beat: Heartbeat, seconds: float) -> None:
    """Open nothing new and wait until the routers have moved or finished what is open."""
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
    dtype = getattr(torch, settings.dtype)
    kernels = select_kernels(settings.kernels, device)
    model = load_target(path, dtype=dtype, device=device, kernels=kernels)
    info = replace(
        model.info,
        numerics_fingerprint=numerics_fingerprint(
            dtype,
            kernels,
            device,
            model=model.info.model_fingerprint,
            noise_candidates=settings.noise_candidates,
            processor=_processor(),
        ),
        has_chat_template=chat_template(path) is not None,
    )
    cache = KVCache(
        model.config,
        pages=settings.pages,
        page_size=settings.page_size,
        dtype=dtype,
        device=device,
        max_step_rows=settings.max_step_tokens,
        prefix_cache=settings.prefix_cache,
    )
    warm_up(model, cache, settings.noise_candidates)
    engine = VerifyEngine(
        model,
        cache,
        EngineSettings(max_step_tokens=settings.max_step_tokens, noise_candidates=settings.noise_candidates),
        info=info,
        metrics=Metrics(CollectorRegistry()),
    )
    _log.info("model loaded", model=info.name, path=str(path), seconds=round(time.perf_counter() - began, 2))
    return engine, tokenizer_files(path, info)


def _processor() -> str:
    """The kind of CPU: its instructions and caches decide how oneDNN cuts a product, so how it rounds.

    The number of threads does not: bf16 and float32 rows are bit-equal with 1, 2 and 3 (torch 2.13, Gemma 3 270M).
    """
    facts = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    names = ("vendor_id", "model name", "cpu family", "model")
    return " ".join(facts[name] for name in names if name in facts) or platform.processor()


def _record(settings: Settings, thread: EngineThread, address: str, metrics_port: int) -> Callable[[], WorkerRecord]:
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
        )

    return record
