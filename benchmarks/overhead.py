"""Where a round's time goes, and how long the verifier stands idle while sequences could run.

    python -m benchmarks.overhead [--streams 1 8] [--prompts FILE.jsonl] [--json FILE]

Starts an embedded cluster, runs the streams, and reads the router's own clocks from its metrics before and after: the
phases of its loop, and what the workers' replies say of their time. RPC is what is left of a phase.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import time
from typing import Any
from urllib.request import urlopen

import redis
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from benchmarks.command import parser_of, write_json
from dspark.client import Client
from dspark.cluster import Cluster
from dspark.evaluation import Settings, evaluate, read_prompts

PROMPTS = [
    f"Question: A shop has {n} boxes with {m} pencils each and sells {n + m} pencils. How many are left?\nAnswer:"
    for n, m in zip(range(3, 67), range(69, 5, -1), strict=True)
]
ROWS = (
    ("draft: compute", "draft"),
    ("draft: waiting for features", "features"),
    ("draft: queue", "draft_queue"),
    ("draft: RPC", "draft_rpc"),
    ("schedule", "schedule"),
    ("verify: forward", "forward"),
    ("verify: sampling", "sample"),
    ("verify: queue", "verify_queue"),
    ("verify: RPC and rest", "verify_rpc"),
    ("commit", "commit"),
    ("round", "round"),
)


def read_metrics(port: int) -> dict[str, float]:
    """Every counter of the router, by name and label value."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {".".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def breakdown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Milliseconds a round (a step of the router's loop), and the verifier's idle share."""
    steps = after["dspark_router_steps_total"] - before["dspark_router_steps_total"]

    def each(name: str) -> float:
        return (after[name] - before[name]) * 1000 / steps

    phase = {p: each(f"dspark_router_phase_seconds_total.{p}") for p in ("propose", "schedule", "verify", "commit")}
    parts = ("draft_total", "feature_wait", "draft_queue", "verify_forward", "verify_sample", "verify_total")
    part = {p: each(f"dspark_router_engine_seconds_total.{p}") for p in (*parts, "verify_queue")}
    return {
        "draft": part["draft_total"],
        "features": part["feature_wait"],
        "draft_queue": part["draft_queue"],
        "draft_rpc": phase["propose"] - part["draft_total"] - part["feature_wait"] - part["draft_queue"],
        "schedule": phase["schedule"],
        "forward": part["verify_forward"],
        "sample": part["verify_sample"],
        "verify_queue": part["verify_queue"],
        "verify_rpc": phase["verify"] - part["verify_forward"] - part["verify_sample"] - part["verify_queue"],
        "commit": phase["commit"],
        "round": sum(phase.values()),
        "verifier_idle_share": 1 - part["verify_total"] / each("dspark_router_runnable_seconds_total"),
        "rounds": steps,
    }


async def measure(client: Client, port: int, prompts: list[str], streams: int) -> dict[str, float]:
    """One run of all prompts, `streams` at a time."""
    before = read_metrics(port)
    result = await evaluate(client, prompts, Settings(max_tokens=64, temperature=0.0, concurrency=streams))
    figures = breakdown(before, read_metrics(port))
    return figures | {"tau": result.counts.tau, "tokens_per_second": result.tokens_per_second}


def store_milliseconds(url: str) -> float:
    """Median time of reading the workers' set: what the router's background reader does, off its rounds."""
    with redis.Redis.from_url(url) as store:
        times = []
        for _ in range(50):
            began = time.perf_counter()
            store.smembers("dspark:1:workers")
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """All stream counts on one cluster."""
    count = max(16, *args.streams)  # as many streams run as are asked for
    known = read_prompts(args.prompts, limit=count, template="qa") if args.prompts else PROMPTS
    prompts = [known[n % len(known)] for n in range(count)]
    port = free_port()
    async with (
        Cluster(args.model, args.drafter, together=None, router_args=["--metrics-port", str(port)]) as cluster,
        cluster.client() as client,
    ):
        await measure(client, port, prompts[:4], 4)  # warm
        figures = {str(n): await measure(client, port, prompts, n) for n in args.streams}
        return {"streams": figures, "store_ms": await asyncio.to_thread(store_milliseconds, cluster.store_url)}


def show(report: dict[str, Any]) -> None:
    """The table."""
    table = Table("ms a round", *(f"{n} streams" for n in report["streams"]))
    for title, key in ROWS:
        table.add_row(title, *(f"{figures[key]:.2f}" for figures in report["streams"].values()))
    table.add_section()
    for title, key, form in (
        ("verifier idle while sequences were runnable", "verifier_idle_share", "{:.1%}"),
        ("accepted length τ", "tau", "{:.2f}"),
        ("tokens/s", "tokens_per_second", "{:.1f}"),
    ):
        table.add_row(title, *(form.format(figures[key]) for figures in report["streams"].values()))
    table.caption = f"Store: read in the background, {report['store_ms']:.2f} ms each; no round waits for it."
    Console().print(table)


def main() -> None:
    """Parse, run, show."""
    parser = parser_of(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    report = asyncio.run(run(args))
    show(report)
    write_json(report, args.json)


if __name__ == "__main__":
    main()
