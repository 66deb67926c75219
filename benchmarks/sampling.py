"""Time of choosing tokens from logits of a large vocabulary, as verification does it.

    python benchmarks/sampling.py [--kernels torch] [--vocab 262144] [--rows 1 8 48 128] [--threads 2] [--json FILE]

Rows carry bfloat16 logits with a peaked head and a long tail. "stand" verifies blocks of 6 rows whose drafts all stand,
"fall" blocks whose first draft falls; a row of such a block counts whether it had to be judged or not. Least of the
repeats: other processes only ever add time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dspark.kernels import select_kernels
from dspark.messages import Mode, Sampling, SparseDistribution
from services.verifier.candidates import Candidate, Outcome
from services.verifier.kernels import verifier_kernels
from services.verifier.verification import verify as reference

Verify = Callable[..., list[Outcome]]

BLOCK = 6
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "T=1": Sampling(),
    "T=0.7, top_k 50": Sampling(temperature=0.7, top_k=50),
    "T=1, top_p 0.9": Sampling(top_p=0.9),
    "T=1.5, top_p 0.95": Sampling(temperature=1.5, top_p=0.95),
    "T=1, logprobs 5": Sampling(logprobs=5),
}


def make_logits(rows: int, vocab: int) -> torch.Tensor:
    """Logits whose 256 most likely tokens hold 0.996 of the probability at temperature 1, and 0.72 at 1.5."""
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab)
    logits[:, :200] += torch.linspace(15, 5, 200)
    return logits


def plain(sampling: Sampling, rows: int) -> list[Candidate]:
    """One row a request."""
    return [Candidate(replace(sampling, seed=i), i, 100) for i in range(rows)]


def blocks(logits: torch.Tensor, mode: Mode, *, stand: bool) -> list[Candidate]:
    """`BLOCK` rows a request, the last without a draft; all its drafts stand or the first falls."""
    tail = logits.shape[1] - 1
    alone = [Candidate(Sampling(seed=i // BLOCK), i, 100 + i) for i in range(len(logits))]
    chosen = [outcome.token for outcome in reference(logits, alone)]
    made = []
    for start in range(0, len(logits) - BLOCK + 1, BLOCK):
        drafts = tuple(chosen[start : start + BLOCK - 1]) if stand else (tail,) * (BLOCK - 1)
        # Probabilities so small that a draft always stands, or so large that it always falls.
        q = tuple(SparseDistribution((x, x - 1), (1e-9, 1 - 1e-9) if stand else (1.0, 0.0)) for x in drafts)
        made.append(Candidate(Sampling(seed=start // BLOCK, mode=mode), start, 100 + start, drafts, q))
    return made


def milliseconds(verify: Verify, logits: torch.Tensor, requests: list[Candidate], repeats: int) -> float:
    """Least wall time of one call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        verify(logits, requests)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 48, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", choices=("auto", "torch", "llvm"), default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    verify = verifier_kernels(select_kernels(arguments.kernels, torch.device("cpu"))).verify
    cases: dict[str, dict[int, float]] = {}
    for rows in arguments.rows:
        logits = make_logits(rows, arguments.vocab)
        work = {name: plain(sampling, rows) for name, sampling in SAMPLINGS.items()}
        if rows >= BLOCK:
            for mode in Mode:
                for stand in (True, False):
                    work[f"{mode.value}, {'stand' if stand else 'fall'}"] = blocks(logits, mode, stand=stand)
        for name, requests in work.items():
            cases.setdefault(name, {})[rows] = milliseconds(verify, logits, requests, arguments.repeats)
    report(cases, arguments.rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "milliseconds": cases}, indent=1))


def report(cases: dict[str, dict[int, float]], rows: list[int]) -> None:
    """One line a case, one column a number of rows."""
    table = Table("ms (a row)", *(f"{n} rows" for n in rows))
    for name, times in cases.items():
        table.add_row(name, *(f"{times[n]:.2f} ({times[n] / n:.2f})" if n in times else "" for n in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
