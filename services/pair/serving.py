"""The life of a verify worker and a draft worker that share a process and its one computing thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from dspark import program
from dspark.costs import CostProfile
from dspark.devices import pick_device, usage_of
from dspark.rpc.server import serve
from dspark.store import Directory, Heartbeat, WorkerRecord
from dspark.telemetry import start_metrics_server
from services.draft import serving as drafting
from services.draft.metrics import DraftMetrics
from services.draft.worker import DraftWorker
from services.pair.near import Links
from services.pair.settings import Settings
from services.pair.turns import Turns
from services.verifier import worker as verifying
from services.verifier.thread import EngineThread

__all__ = ["serve_until_told"]

_log = structlog.get_logger(__name__)


async def serve_until_told(settings: Settings, path: Path) -> None:
    """Serve the model at `path` and a drafter of it until SIGTERM or SIGINT, then drain both.

    `StartupError` where they cannot start.
    """
    stop, loop = program.stop_signal(), asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        executor = stack.enter_context(program.one_thread("engine"))
        engine, files = await loop.run_in_executor(executor, verifying.prepare, settings, path)
        own = settings.of_drafter(path)
        drafter, offer = await loop.run_in_executor(executor, drafting.prepare, own)
        hand_over, on_end = loop.call_soon_threadsafe, verifying.ending(stop)
        thread = stack.enter_context(EngineThread(engine, on_end=on_end, hand_over=hand_over, executor=executor))
        links = Links(thread, settings.feature_queue_mib << 20)
        metrics = DraftMetrics(CollectorRegistry())
        directory = await stack.enter_async_context(Directory(settings.store))
        worker = await stack.enter_async_context(
            DraftWorker(
                drafter,
                offer,
                metrics=metrics,
                present=lambda: drafting.verifiers(directory, offer) if links.address else (),
                connect_seconds=settings.connect_seconds,
                executor=Turns(thread),
                connect=links.connect,
            )
        )
        services = [verifying.servicer(settings, thread, files), drafting.servicer(own, worker, offer.drafter)]
        server = await stack.enter_async_context(serve(settings.listen, services))
        address = links.address = program.address_of(settings.listen, settings.advertise, server.port)
        engine.metrics.follow(thread.load)
        port = _show(stack, settings, engine.metrics.registry)
        draft_port = _show(stack, own, metrics.registry)
        costs, draft_costs = verifying.kept_costs(engine), drafting.kept_costs(drafter)
        record = verifying.record_of(settings, thread, address, port)
        draft_record = drafting.record_of(own, worker, offer.drafter, draft_costs, address, draft_port)
        beat = _announce(stack, settings, record, costs)
        draft_beat = _announce(stack, own, draft_record, draft_costs)
        names = {"model": engine.info.name, "drafter": offer.drafter.name, "draft_worker_id": own.worker_id}
        _log.info("ready", address=address, metrics_port=port, draft_metrics_port=draft_port, **names)
        await stop.wait()
        await asyncio.gather(
            verifying.drain(thread, beat, settings.drain_seconds), drafting.drain(worker, draft_beat, own.drain_seconds)
        )


def _show(stack: AsyncExitStack, settings: Settings, registry: CollectorRegistry) -> int:
    """One worker's figures; the port that they are shown on."""
    server = start_metrics_server(settings.metrics_port, host=settings.metrics_host, registry=registry)
    return stack.enter_context(server).port


def _announce(
    stack: AsyncExitStack, settings: Settings, record: Callable[[], WorkerRecord], known: CostProfile | None
) -> Heartbeat:
    """One worker to the store, from now on."""
    usage = usage_of(pick_device(settings.device))
    return stack.enter_context(Heartbeat(settings.store, record, usage=usage, profile=known))
