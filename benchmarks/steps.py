"""Times of verify and draft steps beside what the machine could do at best.

    python -m benchmarks.steps [--weights int8] [--draft-weights plain] [--tokens 1 8 64] [--contexts 64 512]

Steps run in the engines, whole: plan, forward, head, sampling at temperature 1, commit. Each sample is followed by one
of reading as many bytes as the target's weights have in bfloat16, the least that a step could take; a neighbour on the
machine slows both. Matrix throughput is that of one large product, by torch or by the kernels at hand, whichever is
faster. A point's tokens are spread over sequences of four.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dspark import program
from dspark.cluster import DEFAULT_MODEL, find_drafter
from dspark.models.pull import resolve_model

program.wait_briefly()  # as the workers do, before torch loads

import torch  # noqa: E402

from dspark.devices import Numerics, pick_numerics  # noqa: E402
from dspark.kernels.linear import linear as plain_linear  # noqa: E402
from dspark.models.config import TargetConfig  # noqa: E402
from dspark.models.kv_cache import KVCache  # noqa: E402
from dspark.models.target import TargetModel, load_target  # noqa: E402
from dspark.sampling import DraftChooser  # noqa: E402
from services.draft.architectures import load as load_drafter  # noqa: E402
from services.draft.engine import DraftEngine  # noqa: E402
from services.draft.offer import TapOffer  # noqa: E402
from services.draft.profiling import rehearsal  # noqa: E402
from services.verifier.engine import VerifyEngine  # noqa: E402
from services.verifier.profiling import Rehearsal  # noqa: E402

_CPU = torch.device("cpu")
_PAGES = 4096


def layer_weights(config: TargetConfig) -> int:
    """Weights of the decoder layers' matrices."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # queries and output, keys, values
    return config.num_layers * config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def head_weights(config: TargetConfig) -> int:
    """Weights of the output head."""
    return config.vocab_size * config.hidden_size


class Machine:
    """What memory and arithmetic give at best."""

    def __init__(self, weight_bytes: int) -> None:
        self._stream = torch.ones(weight_bytes // 4, dtype=torch.float32)

    def stream(self) -> float:
        """Seconds of reading the weights' bytes once."""
        return _seconds(self._stream.sum)

    @staticmethod
    def flops(numerics: Numerics, repeats: int = 10) -> float:
        """Floating-point operations a second of one product of 1024 x 4096 x 4096."""
        weight, rows = torch.randn(4096, 4096).bfloat16(), torch.randn(1024, 4096).bfloat16()
        made = (plain_linear, numerics.products), (numerics.kernels.linear, numerics.dtype)
        works = [partial(layer(weight.to(dtype)), rows.to(dtype)) for layer, dtype in made]
        return 2.0 * 1024 * 4096 * 4096 / min(_seconds(work) for work in works for _ in range(repeats))


def sample(machine: Machine, step: Callable[[], float], repeats: int) -> dict[str, float]:
    """Median and least milliseconds of a step, of reading the weights beside it, and the ratio of the least ones."""
    step()
    steps, streams = zip(*((step(), machine.stream()) for _ in range(repeats)), strict=True)
    return {
        "ms": statistics.median(steps) * 1e3,
        "least_ms": min(steps) * 1e3,
        "stream_ms": min(streams) * 1e3,
        "ratio": min(steps) / min(streams),
    }


def verify_steps(args: argparse.Namespace, model: TargetModel, machine: Machine, flops: float) -> list[dict[str, Any]]:
    """One entry for each number of tokens and context."""
    cache = KVCache(model.config, pages=_PAGES, dtype=model.kept_dtype, device=_CPU)
    steps = Rehearsal(VerifyEngine(model, cache), cache)
    entries = []
    for context in args.contexts:
        for tokens in args.tokens:
            entry = sample(machine, partial(steps.time, tokens, context), args.repeats)
            arithmetic = 2.0 * tokens * (layer_weights(model.config) + head_weights(model.config))
            share = arithmetic / (entry["least_ms"] / 1e3) / flops
            entries.append({"tokens": tokens, "context": context, "throughput_share": share, **entry})
    return entries


def draft_steps(args: argparse.Namespace, target: Path, machine: Machine) -> list[dict[str, Any]]:
    """One entry for each number of blocks and context."""
    numerics = pick_numerics(args.kernels, args.dtype, _CPU, weights=args.draft_weights)
    kernels = numerics.kernels
    path = find_drafter(args.drafter, args.model)
    if path is None:
        return []
    drafter = load_drafter(path, target, dtype=numerics.dtype, device=_CPU)
    engine = DraftEngine(drafter, DraftChooser(bits=kernels.keyed_bits), kernels, context_positions=1 << 15)
    size = TapOffer.of(drafter, path).row_bytes // 2
    with ExitStack() as stack:
        steps = stack.enter_context(rehearsal(engine, size))
        shapes = [(blocks, context) for blocks in (1, 8) for context in args.contexts]
        return [
            {"blocks": blocks, "context": context, "kernels": kernels.name}
            | sample(machine, partial(steps.time, blocks, context), args.repeats)
            for blocks, context in shapes
        ]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    path = resolve_model(args.model)
    numerics = pick_numerics(args.kernels, args.dtype, _CPU, weights=args.weights)
    model = load_target(path, dtype=numerics.dtype, device=_CPU, kernels=numerics.kernels)
    weight_bytes = torch.bfloat16.itemsize * (layer_weights(model.config) + head_weights(model.config))
    machine = Machine(weight_bytes)
    flops = machine.flops(numerics)
    return {
        "model": model.info.name,
        "weights": args.weights,
        "kernels": numerics.kernels.name,
        "dtype": str(numerics.products).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "weight_bytes": weight_bytes,
        "gflops": flops / 1e9,
        "stream_ms": min(machine.stream() for _ in range(10)) * 1e3,
        "verify": verify_steps(args, model, machine, flops),
        "draft": draft_steps(args, path, machine),
    }


def show(report: dict[str, Any]) -> None:
    """The tables."""
    gigabytes = report["weight_bytes"] / 1e9
    verify = Table("verify: tokens", "context", "ms", "least", "times one read of the weights", "of matrix throughput")
    for e in report["verify"]:
        figures = f"{e['ms']:.1f}", f"{e['least_ms']:.1f}", f"{e['ratio']:.2f}", f"{e['throughput_share']:.0%}"
        verify.add_row(str(e["tokens"]), str(e["context"]), *figures)
    verify.caption = (
        f"{report['model']} in {report['dtype']}, {report['weights']} weights, kernels {report['kernels']}, "
        f"{report['threads']} threads. "
        f"Reading {gigabytes:.2f} GB takes {report['stream_ms']:.1f} ms at best "
        f"({gigabytes / report['stream_ms'] * 1e3:.0f} GB/s); matrices {report['gflops']:.0f} GFLOP/s."
    )
    Console().print(verify)
    alone = {e["context"]: e["least_ms"] for e in reversed(report["verify"])}
    draft = Table("draft: blocks", "context", "ms", "least", "of the shortest verify step")
    for e in report["draft"]:
        share = e["least_ms"] / alone[e["context"]]
        draft.add_row(str(e["blocks"]), str(e["context"]), f"{e['ms']:.1f}", f"{e['least_ms']:.1f}", f"{share:.0%}")
    if report["draft"]:
        draft.caption = f"Kernels {report['draft'][0]['kernels']}."
    Console().print(draft)


def main() -> None:
    """Parse, run, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default="default")
    parser.add_argument("--weights", choices=("plain", "int8"), default="plain")
    parser.add_argument("--draft-weights", choices=("auto", "plain", "int8"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--kernels", choices=("auto", "torch", "llvm"), default="auto")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = run(args)
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
