"""How fast the router's costs follow the machine: an outside load that comes and goes, one frozen step.

    python -m benchmarks.shocks [--streams 4] [--seconds 20] [--burners 1] [--prompts FILE.jsonl] [--json FILE]

Streams run in a closed loop on an embedded cluster while processes of no other use start and stop beside them, and the
verify worker is stopped once for twenty steps' time. The router's trace tells what it expected of each round and what
came. A change is followed when the median error of the next rounds is within 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import parser_of, write_json
from benchmarks.overhead import PROMPTS
from dspark.client import Client
from dspark.cluster import Cluster
from dspark.evaluation import read_prompts

FOLLOWED = 0.15
JUDGED = 8  # rounds whose median error is the router's
OUTLIER = 20  # steps' time that the worker is stopped for
AFTER = 50  # rounds in which one outlier may still be seen
BURNER = "import itertools\nfor _ in itertools.count(): pass"

Trace = list[dict[str, Any]]


async def keep_busy(client: Client, prompts: Sequence[str], number: int) -> None:
    """One user: a request after another for ever."""
    for turn in itertools.count():
        prompt = prompts[(number + 7 * turn) % len(prompts)]
        await client.complete(prompt, max_tokens=96, temperature=1.0, seed=1000 * number + turn)


@contextlib.asynccontextmanager
async def users(client: Client, prompts: Sequence[str], streams: int) -> AsyncIterator[None]:
    """So many users while the block runs."""
    tasks = [asyncio.create_task(keep_busy(client, prompts, number)) for number in range(streams)]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def burners(count: int) -> AsyncIterator[None]:
    """So many busy processes while the block runs."""
    running = [await asyncio.create_subprocess_exec(sys.executable, "-c", BURNER) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            await process.wait()


async def freeze(pid: int, seconds: float) -> None:
    """The process does not run for so long."""
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """All shocks on one cluster."""
    prompts = read_prompts(args.prompts, limit=64, template="qa") if args.prompts else PROMPTS
    with tempfile.TemporaryDirectory() as place:
        trace = Path(place) / "rounds.jsonl"
        cluster = Cluster(args.model, args.drafter, policy="adaptive", router_args=["--trace", str(trace)])
        async with cluster, cluster.client() as client, users(client, prompts, args.streams):
            await asyncio.sleep(args.seconds)
            loaded = time.time()
            async with burners(args.burners):
                await asyncio.sleep(args.seconds)
            calm = time.time()
            await asyncio.sleep(args.seconds)
            frozen = time.time()
            step = statistics.median(one["step_seconds"] for one in enough(read(trace, calm, frozen), 2 * JUDGED))
            await freeze(cluster.pid("verify-1"), OUTLIER * step)
            await asyncio.sleep(max(args.seconds, 1.5 * AFTER * step))
            ended = time.time()
        return {
            "streams": args.streams,
            "load": followed(enough(read(trace, loaded, calm), 2 * JUDGED), loaded),
            "calm": followed(read(trace, calm, frozen), calm),
            "outlier": outlier(read(trace, calm, frozen), enough(read(trace, frozen, ended), 2 * JUDGED)),
        }


def enough(rounds: Trace, count: int) -> Trace:
    """The rounds, where there are so many."""
    if len(rounds) < count:
        sys.exit(f"{len(rounds)} rounds in a phase are too few, {count} are needed: raise --seconds")
    return rounds


def read(trace: Path, start: float, end: float) -> Trace:
    """Rounds that ended in between; those that are mostly prompts teach nothing about steps."""
    lines = [line for line in trace.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    rounds = [json.loads(line) for line in lines]
    return [one for one in rounds if start <= one["at"] < end and one["running"] and not one["prompt_rows"]]


def error(one: dict[str, Any]) -> float:
    """Log of the expected over the real seconds of the step."""
    return math.log(one["expected_step_seconds"] / one["step_seconds"])


def followed(rounds: Trace, changed: float) -> dict[str, Any]:
    """When the router's picture was right again, and how far off it was at first and at the end."""
    errors = [error(one) for one in rounds]
    medians = [abs(statistics.median(errors[at : at + JUDGED])) for at in range(len(errors) - JUDGED + 1)]
    right = next((at for at, value in enumerate(medians) if value <= math.log(1 + FOLLOWED)), None)
    half = rounds[len(rounds) // 2 :]
    return {
        "rounds": len(rounds),
        "step_ms": 1000 * statistics.median(one["step_seconds"] for one in half),
        "first_error": medians[0],
        "seconds": None if right is None else rounds[right]["at"] - changed,
        "settled_error": abs(statistics.median(error(one) for one in half)),
        "verified": statistics.mean(one["verified"] / one["running"] for one in half),
    }


def outlier(before: Trace, after: Trace) -> dict[str, Any]:
    """What one step of twenty times its time left behind in expectations and budgets."""
    stopped = max(range(len(after)), key=lambda at: after[at]["step_seconds"])
    usual = statistics.median(map(error, before))
    later = after[stopped + 1 :]
    off = [abs(error(one) - usual) for one in later]
    windows = [statistics.median(off[at : at + JUDGED]) for at in range(max(0, len(off) - JUDGED + 1))]
    return {
        "times": after[stopped]["step_seconds"] / statistics.median(one["step_seconds"] for one in before),
        "worst_error": max(windows[:AFTER], default=None),
        "error_after": statistics.median(off[AFTER:]) if len(off) > AFTER else None,
        "verified_before": statistics.mean(one["verified"] / one["running"] for one in before[-AFTER:]),
        "verified_after": statistics.mean(one["verified"] / one["running"] for one in later[:AFTER]),
    }


def show(report: dict[str, Any]) -> None:
    """The tables."""
    table = Table("", "step ms", "error at first", "right again after", "error then", "drafts verified")
    for title, key in (("outside load comes", "load"), ("it goes", "calm")):
        found = report[key]
        again = "not in this phase" if found["seconds"] is None else f"{found['seconds']:.1f} s"
        first, settled = (f"{math.expm1(found[name]):.0%}" for name in ("first_error", "settled_error"))
        table.add_row(title, f"{found['step_ms']:.0f}", first, again, settled, f"{found['verified']:.2f}")
    Console().print(table)
    found = report["outlier"]
    Console().print(
        f"One step took {found['times']:.0f} times its time: expectations moved by at most "
        f"{math.expm1(found['worst_error'] or 0):.0%} (medians of {JUDGED} rounds), drafts verified a stream and round "
        f"{found['verified_before']:.2f} before, {found['verified_after']:.2f} in the {AFTER} rounds after."
    )


def main() -> None:
    """Parse, run, show."""
    parser = parser_of(__doc__)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--burners", type=int, default=1, help="busy processes of the outside load")
    args = parser.parse_args()
    report = asyncio.run(run(args))
    show(report)
    write_json(report, args.json)


if __name__ == "__main__":
    main()
