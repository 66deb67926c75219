"""Triton kernels against their torch references and against the card's memory: `python -m benchmarks.kernels`.

    python -m benchmarks.kernels [--json FILE] [--repeats 50] [--context 4096] [--streams 8]

Shapes are those of a Qwen3-4B-like target in bfloat16 that verifies 6 rows a stream. "GB/s" counts what a kernel has to
read and write at least, "of copy" is that rate over the card's own copy of a large tensor, measured in the same run. A
kernel and its reference take turns, and medians are compared. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dspark.kernels import TORCH, Kernels, select_kernels
from dspark.kernels.attention import Span
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.models.drafters.heads import MarkovHead
from dspark.sampling import DraftChooser
from services.draft.context import ContiguousKV, KVShape
from services.draft.kernels import attention as blocks
from services.draft.kernels import draft_kernels
from services.draft.kernels.sequential import SequentialHead
from services.verifier.candidates import Candidate
from services.verifier.kernels import verifier_kernels

CUDA, DTYPE = torch.device("cuda"), torch.bfloat16
HIDDEN, INNER, VOCAB = 2560, 9728, 151_936
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
BLOCK, RANK = 7, 256
VERIFIED = 6

Run = Callable[[Kernels], Callable[[], Any]]
"""What a case measures, prepared on some kernels."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape; `size` is the least number of bytes it moves."""

    name: str
    size: int
    run: Run


@dataclass(frozen=True)
class Figure:
    """Median microseconds, and what the kernel's own come to."""

    name: str
    triton_us: float
    torch_us: float
    gb_per_second: float
    of_copy: float


def randn(*shape: int) -> torch.Tensor:
    """Random numbers on the card."""
    return torch.randn(*shape, device=CUDA).to(DTYPE)


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def row_cases(rows: int) -> Iterator[Case]:
    """Norms and linears."""
    x, y, weight = randn(rows, HIDDEN), randn(rows, HIDDEN), torch.rand(HIDDEN, device=CUDA)
    yield Case("rms_norm", 2 * size_of(x), lambda k: lambda: k.rms_norm(x, weight, 1e-6))
    yield Case("add_norm", 4 * size_of(x), lambda k: lambda: k.add_norm(x, y, weight, 1e-6))
    gate, up, head = randn(INNER, HIDDEN), randn(INNER, HIDDEN), randn(VOCAB, HIDDEN)

    def gated(kernels: Kernels) -> Callable[[], Any]:
        layer = kernels.gated(gate, up, "silu")
        return lambda: layer(x)

    def linear(kernels: Kernels) -> Callable[[], Any]:
        layer = kernels.linear(head)
        return lambda: layer(x)

    yield Case("gated linear", size_of(gate, up), gated)
    yield Case("head", size_of(head) + rows * VOCAB * DTYPE.itemsize, linear)


def attention_case(name: str, lengths: list[tuple[int, int]], window: int | None = None) -> Case:
    """Paged attention of (start, count) spans."""
    spans, row, page = [], 0, 1
    for start, count in lengths:
        needed = -(-(start + count) // PAGE)
        spans.append(Span(row, start, count, list(range(page, page + needed))))
        row, page = row + count, page + needed
    q, storage = randn(row, HEADS, DIM), randn(2 * KV_HEADS, page, PAGE * DIM)
    seen = sum(min(start + count, window + count if window else start + count) for start, count in lengths)

    def run(kernels: Kernels) -> Callable[[], Any]:
        group = HEADS // KV_HEADS
        plan = kernels.plan_attention(spans, page_size=PAGE, window=window, group=group, dtype=DTYPE, device=CUDA)
        return lambda: kernels.paged_attention(q, storage, plan, DIM**-0.5)

    return Case(name, 2 * seen * KV_HEADS * DIM * DTYPE.itemsize + 2 * size_of(q), run)


def verify_case(name: str, sampling: Sampling, streams: int) -> Case:
    """Verification of `VERIFIED` rows a stream."""
    logits = randn(streams * VERIFIED, VOCAB) * 3
    best = logits.argmax(-1).tolist()
    requests = []
    for stream in range(streams):
        first = stream * VERIFIED
        drafts = tuple(best[first : first + VERIFIED - 1])
        certain = tuple(SparseDistribution((token,), (1.0,)) for token in drafts)
        requests.append(Candidate(sampling, first, 100, drafts, certain))

    def run(kernels: Kernels) -> Callable[[], Any]:
        verify = verifier_kernels(kernels).verify
        return lambda: verify(logits, requests)

    return Case(name, size_of(logits), run)


def block_case(streams: int, context: int) -> Case:
    """Attention of one block a stream over its context."""
    rows = BLOCK * streams
    shape = KVShape(1, KV_HEADS, DIM, BLOCK)
    spans = []
    for _ in range(streams):
        own = ContiguousKV(shape, context + BLOCK, dtype=DTYPE, device=CUDA)
        own.append([(randn(context, KV_HEADS, DIM), randn(context, KV_HEADS, DIM))], 0, context)
        spans.append(blocks.Span(own, BLOCK))
    qkv, weight = randn(rows, HEADS + 2 * KV_HEADS, DIM), torch.ones(HEADS + KV_HEADS, DIM, device=CUDA)
    turn = torch.ones(rows, 1, DIM // 2, device=CUDA)

    def run(kernels: Kernels) -> Callable[[], Any]:
        own = draft_kernels(kernels)
        memory = own.memory(shape, 0, DTYPE, CUDA)
        plan = own.plan_block(spans, causal=False, group=HEADS // KV_HEADS)
        return lambda: own.attend(qkv, weight, 1e-6, turn, turn, memory, plan, 0)

    return Case("block attention", 2 * streams * (context + BLOCK) * KV_HEADS * DIM * DTYPE.itemsize, run)


def sequential_case(name: str, sampling: Sampling, streams: int) -> Case:
    """The Markov head over whole blocks."""
    head = MarkovHead(VOCAB, VOCAB, RANK, HIDDEN).to(CUDA, DTYPE).requires_grad_(requires_grad=False)
    base, hidden = torch.randn(streams, BLOCK, VOCAB, device=CUDA), randn(streams, BLOCK, HIDDEN)
    anchors, committed = list(range(streams)), [100] * streams

    def run(kernels: Kernels) -> Callable[[], Any]:
        own = SequentialHead(head, kernels.linear(head.markov_w2.weight), None, None, DraftChooser())
        draft = draft_kernels(kernels).draft_tokens
        return lambda: draft(own, base, hidden, anchors, committed, [sampling] * streams)

    return Case(name, size_of(base) + BLOCK * size_of(head.markov_w2.weight), run)


def cases(streams: int, context: int) -> Iterator[Case]:
    """Everything that is measured."""
    yield from row_cases(streams * VERIFIED)
    yield attention_case("attention, verify", [(context, VERIFIED)] * streams)
    yield attention_case("attention, verify, window 1024", [(context, VERIFIED)] * streams, 1024)
    yield attention_case("attention, prompt piece", [(0, 512)])
    rejection = Sampling(seed=1, mode=Mode.REJECTION)
    for name, sampling in (
        ("greedy", Sampling(temperature=0.0)),
        ("coupled", Sampling(seed=1)),
        ("rejection", rejection),
    ):
        yield verify_case(f"verify, {name}", sampling, streams)
        yield sequential_case(f"sequential head, {name}", sampling, streams)
    yield block_case(streams, context)


def microseconds(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median time of each, taking turns; the first turns, which compile, do not count."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 3):
        for own, run in zip(times, runs, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                own.append(1e3 * begin.elapsed_time(end))
    return [median(own) for own in times]


def copy_rate(repeats: int) -> float:
    """Bytes per second that a copy of 512 MiB reads and writes."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    (taken,) = microseconds([lambda: target.copy_(source)], repeats)
    return 2 * len(source) / (taken * 1e-6)


def measure(case: Case, triton: Kernels, repeats: int, copied: float) -> Figure:
    """Both implementations of a case."""
    own, reference = microseconds([case.run(triton), case.run(TORCH)], repeats)
    rate = case.size / (own * 1e-6)
    return Figure(case.name, own, reference, rate / 1e9, rate / copied)


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=8)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels: this torch sees no CUDA device, so there is nothing to time", file=sys.stderr)
        return 1
    triton, copied = select_kernels("triton", CUDA), copy_rate(options.repeats)
    figures = [measure(case, triton, options.repeats, copied) for case in cases(options.streams, options.context)]
    name = torch.cuda.get_device_name(CUDA)
    show(figures, f"{name}, copies {copied / 1e9:.0f} GB/s, {options.streams} streams at {options.context} positions")
    if options.json:
        report = {"device": name, "copy_gb_per_second": copied / 1e9, "torch": torch.__version__,
                  "kernels": triton.name, "streams": options.streams, "context": options.context,
                  "figures": [asdict(figure) for figure in figures]}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def show(figures: list[Figure], title: str) -> None:
    """The table."""
    table = Table(title=title)
    for column in ("kernel", "triton µs", "torch µs", "GB/s", "of copy"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for f in figures:
        table.add_row(f.name, f"{f.triton_us:.1f}", f"{f.torch_us:.1f}", f"{f.gb_per_second:.0f}", f"{f.of_copy:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
