"""Whether completions have the same token ids alone and in batches, on a real model.

    python -m benchmarks.invariance [--completions 200] [--tokens 32] [--weights int8]

Coupled sampling at temperature 1, straight through the verify engine: every completion alone, then all of them again in
batches of 2 to 32 of mixed lengths. Exit status 1 where any differs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from dspark import program
from dspark.cluster import DEFAULT_MODEL
from dspark.models.pull import resolve_model

program.wait_briefly()  # as the workers do, before torch loads

import torch  # noqa: E402

from dspark.devices import pick_numerics  # noqa: E402
from dspark.messages import OpenSequence, Sampling, SequenceKey, StepItem  # noqa: E402
from dspark.models.kv_cache import KVCache  # noqa: E402
from dspark.models.target import load_target  # noqa: E402
from services.verifier.engine import VerifyEngine  # noqa: E402
from services.verifier.sequences import SequenceState  # noqa: E402

__all__ = ["completions", "differing", "requests"]

_SIZES = (2, 3, 5, 8, 13, 32)
_PIECE = 128  # rows of a prompt at a time


def requests(count: int, tokens: int, vocab: int) -> list[OpenSequence]:
    """Prompts of 3 to 600 made-up ids."""
    draw = random.Random(0)  # noqa: S311 - not for secrets
    made = []
    for number in range(count):
        ids = tuple(draw.randrange(vocab) for _ in range(draw.choice((3, 20, 100, 127, 300, 512, 600))))
        made.append(OpenSequence(SequenceKey(f"r{number}", 0), ids, Sampling(seed=number), len(ids) + tokens))
    return made


def completions(engine: VerifyEngine, batch: Sequence[OpenSequence]) -> list[tuple[int, ...]]:
    """The batch's tokens, decoded together in ragged steps."""
    for opened in engine.open(batch):
        if opened.error is not None:
            raise opened.error
    states = [engine.find(request.key) for request in batch]
    while running := [state for state in states if state.committed_len < state.request.max_len]:
        items = [_item(state, number % 4) for number, state in enumerate(running)]
        for verdict in engine.step(items).verdicts:
            if verdict.error is not None:
                raise verdict.error
    tokens = [tuple(state.token_ids[len(state.request.token_ids) :]) for state in states]
    engine.close([request.key for request in batch])
    return tokens


def _item(state: SequenceState, drafts: int) -> StepItem:
    """The next piece of a prompt, or the anchor and drafts that are nonsense."""
    missing = state.committed_len - state.computed_len
    count = min(missing, _PIECE)
    return StepItem(state.key, state.committed_len, count, (drafts,) * drafts if count == missing else ())


def differing(engine: VerifyEngine, wanted: Sequence[OpenSequence]) -> int:
    """Completions that are not the same alone and in some batch."""
    alone = [completions(engine, [request])[0] for request in wanted]
    different: set[int] = set()
    first = 0
    for number in range(len(wanted)):
        part = range(first, min(len(wanted), first + _SIZES[number % len(_SIZES)]))
        together = completions(engine, [wanted[index] for index in part])
        different |= {index for index, tokens in zip(part, together, strict=True) if tokens != alone[index]}
        first = part.stop
        if first == len(wanted):
            break
    return len(different)


def main() -> int:
    """Parse, run, say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", choices=("plain", "int8"), default="plain")
    parser.add_argument("--completions", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    device = torch.device("cpu")
    numerics = pick_numerics("auto", "auto", device, weights=args.weights)
    path = resolve_model(args.model)
    model = load_target(path, dtype=numerics.dtype, device=device, kernels=numerics.kernels)
    cache = KVCache(model.config, pages=2048, dtype=model.kept_dtype, device=device, prefix_cache=False)
    wanted = requests(args.completions, args.tokens, model.config.vocab_size)
    different = differing(VerifyEngine(model, cache), wanted)
    sys.stdout.write(f"{different} of {len(wanted)} completions differ between alone and batches of 2 to 32\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
