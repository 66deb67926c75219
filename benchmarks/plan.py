"""How long planning a round takes, on one core, and what the lossless searches give up against the best plan.

    python -m benchmarks.plan [--requests 8 256 2048] [--block 7] [--json FILE]

Confidences are made up: blocks of unlike quality over a cost table with cliffs every 64 rows. Medians of
processor time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from services.router.scheduling.alternatives import worth
from services.router.scheduling.plan import Floats, asynchronous, early_stop, freshest, survival_of
from services.router.scheduling.whom import whom_to_draft


def blocks(generator: np.random.Generator, requests: int, block: int) -> Floats:
    """(R, n) confidences: each block has a quality of its own and loses a little by position."""
    quality = generator.beta(4, 2, (requests, 1)) * 0.98 ** np.arange(block)
    return np.clip(quality + generator.normal(0, 0.08, (requests, block)), 0.01, 0.99)


def cost_table(requests: int, block: int) -> Floats:
    """Seconds by rows: flat while weights are streamed, then paid by the row, with a cliff at each tile."""
    rows = np.arange(requests * (block + 1) + 1)
    return np.asarray(0.02 + 2e-5 * rows + 6e-4 * (rows // 64) * (0.5 + rows / rows[-1]))


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median processor time, so that other programs on the machine do not count."""
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return statistics.median(times) * 1000


def measure(requests: int, block: int, repeats: int) -> dict[str, float]:
    """One batch size: times, and Θ as a share of the freshest plan's over 30 rounds."""
    generator = np.random.default_rng(0)
    seconds, drafting = cost_table(requests, block), 0.004 + 4e-5 * np.arange(requests + 1)
    shares = np.full(requests, 0.28)
    rounds = [survival_of(blocks(generator, requests, block)) for _ in range(31)]
    confidences, now, before = blocks(generator, requests, block), rounds[1], rounds[0]
    best = [freshest(now, seconds, requests).goodput for now in rounds[1:]]
    stopped = [early_stop(now, seconds, requests).goodput for now in rounds[1:]]
    filled = [asynchronous(n, b, seconds, requests).goodput for b, n in itertools.pairwise(rounds)]
    return {
        "survival_ms": milliseconds(lambda: survival_of(confidences), repeats),
        "early_stop_ms": milliseconds(lambda: early_stop(now, seconds, requests), repeats),
        "asynchronous_ms": milliseconds(lambda: asynchronous(now, before, seconds, requests), repeats),
        "freshest_ms": milliseconds(lambda: freshest(now, seconds, requests), repeats),
        "with_alternatives_ms": milliseconds(
            lambda: freshest(now, seconds, requests, alternatives=worth(now, shares)), repeats
        ),
        "whom_to_draft_ms": milliseconds(lambda: whom_to_draft(before, seconds, drafting, requests), repeats),
        "early_stop_share": sum(stopped) / sum(best),
        "asynchronous_share": sum(filled) / sum(best),
    }


def show(report: dict[str, dict[str, float]]) -> None:
    """The table."""
    table = Table("", *(f"{requests} requests" for requests in report))
    for key in next(iter(report.values())):
        unit = "{:.3f}" if key.endswith("ms") else "{:.1%}"
        table.add_row(key.replace("_", " "), *(unit.format(figures[key]) for figures in report.values()))
    Console().print(table)


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 256, 2048])
    parser.add_argument("--block", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {str(n): measure(n, args.block, args.repeats) for n in args.requests}
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
