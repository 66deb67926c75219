"""The life of a verify worker and a draft worker that share a process and its one computing thread."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from dspark import program
from dspark.devices import pick_device, usage_of
from dspark.rpc.server import serve
from dspark.store import Directory, Heartbeat
from dspark.telemetry import start_metrics_server
from services.draft import serving as drafting
from services.draft.engine import DraftEngine
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer
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
        own = settings.model_copy(update={"target": str(path)})
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
        services = [
            verifying.servicer(settings, thread, files),
            drafting.servicer(settings.draft_worker_id, worker, offer.drafter),
        ]
        server = await stack.enter_async_context(serve(settings.listen, services))
        links.address = program.address_of(settings.listen, settings.advertise, server.port)
        ports = _show(stack, settings, thread, metrics)
        beats = _announce(stack, settings, thread, worker, drafter, offer, links.address, ports)
        _log.info(
            "ready",
            address=links.address,
            metrics_port=ports[0],
            draft_metrics_port=ports[1],
            model=engine.info.name,
            drafter=offer.drafter.name,
            draft_worker_id=settings.draft_worker_id,
        )
        await stop.wait()
        await asyncio.gather(
            verifying.drain(thread, beats[0], settings.drain_seconds),
            drafting.drain(worker, beats[1], settings.drain_seconds),
        )


def _show(stack: AsyncExitStack, settings: Settings, thread: EngineThread, metrics: DraftMetrics) -> tuple[int, int]:
    """Figures of the verify and the draft worker; the ports that they are shown on."""
    own = thread.engine.metrics
    own.follow(thread.load)
    host = settings.metrics_host
    verify = stack.enter_context(start_metrics_server(settings.metrics_port, host=host, registry=own.registry))
    draft = stack.enter_context(start_metrics_server(settings.draft_metrics_port, host=host, registry=metrics.registry))
    return verify.port, draft.port


def _announce(
    stack: AsyncExitStack,
    settings: Settings,
    thread: EngineThread,
    worker: DraftWorker,
    drafter: DraftEngine,
    offer: TapOffer,
    address: str,
    ports: tuple[int, int],
) -> tuple[Heartbeat, Heartbeat]:
    """Both workers to the store, from now on."""
    device = pick_device(settings.device)
    known = drafting.kept_costs(drafter)
    verify = verifying.record_of(settings, thread, address, ports[0])
    draft = drafting.record_of(settings.draft_worker_id, worker, offer.drafter, known, address, ports[1])
    costs = verifying.kept_costs(thread.engine)
    return (
        stack.enter_context(Heartbeat(settings.store, verify, usage=usage_of(device), profile=costs)),
        stack.enter_context(Heartbeat(settings.store, draft, usage=usage_of(device), profile=known)),
    )
