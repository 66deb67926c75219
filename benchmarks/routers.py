"""Two routers over one verify worker against one router with the same load: throughput, and the same tokens.

    python -m benchmarks.routers [--streams 8] [--requests 24] [--repeats 3] [--prompts FILE.jsonl] [--json FILE]

The runs take turns on one cluster, to which a second router is added; with two, half of the users ask each.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.command import parser_of, write_json
from benchmarks.overhead import PROMPTS
from dspark.benchmarking.load import Run, Task, closed_loop
from dspark.client import Client
from dspark.cluster import Cluster
from dspark.errors import StartupError
from dspark.evaluation import read_prompts
from dspark.processes import Child, spawn
from dspark.rpc.probe import serving

START_SECONDS = 30.0


async def second_router(cluster: Cluster) -> tuple[Child, str]:
    """Another router of the cluster's workers, and its address."""
    log = cluster.log_dir / "router-2.log"
    line = [sys.executable, "-m", "services.router", "--store", cluster.store_url, "--listen", "127.0.0.1:0"]
    child = await spawn("router-2", line, log_path=log)
    async with asyncio.timeout(START_SECONDS):
        while child.returncode is None:
            ready = [str(one["address"]) for one in child.json_lines() if one.get("event") == "ready"]
            if ready and await serving(ready[0]):
                return child, ready[0]
            await asyncio.sleep(0.1)
    raise StartupError(f"the second router ended: {child.last_line()}")


async def known(client: Client, workers: int) -> None:
    """Returns when the router knows so many workers."""
    async with asyncio.timeout(START_SECONDS):
        while len((await client.loads()).workers) < workers:  # noqa: ASYNC110 - another process decides that
            await asyncio.sleep(0.1)


async def together(clients: Sequence[Client], jobs: Sequence[Task], streams: int) -> dict[str, Any]:
    """The jobs in a closed loop, users and jobs dealt out over the routers."""
    parts = [jobs[n :: len(clients)] for n in range(len(clients))]
    users = streams // len(clients)
    runs = await asyncio.gather(*(closed_loop(c, part, users) for c, part in zip(clients, parts, strict=True)))
    return {"tokens_per_second": _throughput(runs), "answers": _answers(runs)}


def _throughput(runs: Sequence[Run]) -> float:
    """While all users were busy."""
    end = min(run.ran_out for run in runs)
    tokens = sum(n for run in runs for timing in run.timings for at, n in timing.arrivals if at <= end)
    return tokens / end


def _answers(runs: Sequence[Run]) -> list[tuple[int, ...]]:
    """By job."""
    count = sum(len(run.timings) for run in runs)
    answers: list[tuple[int, ...]] = [()] * count
    for part, run in enumerate(runs):
        for timing in run.timings:
            if timing.error is not None:
                raise timing.error
            answers[part + timing.index * len(runs)] = timing.token_ids
    return answers


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """One and two routers in turns."""
    prompts = read_prompts(args.prompts, limit=args.requests, template="qa") if args.prompts else PROMPTS
    jobs: list[Task] = [
        (
            prompts[n % len(prompts)],
            {"max_tokens": 64, "temperature": args.temperature, "seed": n, "policy": args.policy},
        )
        for n in range(args.requests)
    ]
    async with Cluster(args.model, args.drafter, together=None) as cluster, cluster.client() as one:
        child, address = await second_router(cluster)
        try:
            async with Client(address) as other:
                await known(other, len(cluster.workers))
                for client in (one, other):
                    await together([client], jobs[: args.streams], args.streams)  # warm
                rounds = [
                    {len(clients): await together(clients, jobs, args.streams) for clients in order}
                    for _, order in zip(range(args.repeats), _orders(one, other), strict=False)
                ]
        finally:
            await child.stop(patience=3.0)
    return summary(rounds)


def _orders(one: Client, other: Client) -> Any:
    """Who begins changes from repeat to repeat."""
    while True:
        yield [[one], [one, other]]
        yield [[one, other], [one]]


def summary(rounds: Sequence[dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and answers that were not everywhere the same."""
    speeds = {count: [found[count]["tokens_per_second"] for found in rounds] for count in (1, 2)}
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    answers = [found[count]["answers"] for found in rounds for count in (1, 2)]
    return {
        "one": statistics.median(speeds[1]),
        "two": statistics.median(speeds[2]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "answers": len(answers[0]),
        "different": sum(len(set(same)) > 1 for same in zip(*answers, strict=True)),
    }


def main() -> None:
    """Parse, run, show."""
    parser = parser_of(__doc__)
    parser.add_argument("--streams", type=int, default=8, help="an even number of users in all")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--policy", default="adaptive")
    args = parser.parse_args()
    report = asyncio.run(run(args))
    print(
        f"{args.streams} streams: one router {report['one']:.1f} tokens/s, two {report['two']:.1f}; "
        f"two over one {report['ratio']:.3f} (median of {args.repeats}: "
        f"{', '.join(f'{ratio:.3f}' for ratio in report['ratios'])}); "
        f"{report['different']} of {report['answers']} answers differ"
    )
    write_json(report, args.json)


if __name__ == "__main__":
    main()
