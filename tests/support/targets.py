"""Running a target model in tests: load it, feed it sequences in pieces, alone or together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspark.kernels import select_kernels
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import CachedSequence, KVCache
from dspark.models.target import TargetModel, load_target

CPU = torch.device("cpu")


def load(
    path: Path, dtype: torch.dtype = torch.float32, kernels: str = "auto", kept: torch.dtype | None = None
) -> TargetModel:
    """`kept`: of keys and values, where compiled kernels are to have others than float32."""
    own = select_kernels(kernels, CPU)
    return load_target(path, dtype=dtype, device=CPU, kernels=replace(own, kept=kept) if kept else own)


def new_cache(model: TargetModel, pages: int = 256, **settings: int | bool) -> KVCache:
    return KVCache(model.config, pages=pages, dtype=model.kept_dtype, device=CPU, **settings)  # type: ignore[arg-type]


@dataclass
class Piece:
    """Positions start … of a sequence, to be computed in one step."""

    sequence: CachedSequence
    token_ids: Sequence[int]
    start: int


def step(model: TargetModel, cache: KVCache, pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """Hidden rows of each piece."""
    batch = RaggedBatch.build([(p.sequence, p.token_ids, p.start) for p in pieces])
    hidden = model.forward(batch, cache).hidden
    return [hidden[a:b] for a, b in zip(batch.first_rows[:-1], batch.first_rows[1:], strict=True)]


def prefill(
    model: TargetModel, cache: KVCache, token_ids: Sequence[int], piece: int = 512, *, room: int = 64
) -> tuple[CachedSequence, torch.Tensor]:
    """Open a sequence and compute what the prefix cache does not have, `piece` tokens a step.

    The hidden rows are those of positions computed_len (after open) ….
    """
    sequence = cache.open(token_ids, len(token_ids) + room)
    rows = []
    while sequence.computed_len < len(token_ids):
        start = sequence.computed_len
        ids = token_ids[start : start + piece]
        rows += step(model, cache, [Piece(sequence, ids, start)])
        cache.commit(sequence, token_ids, start + len(ids))
    return sequence, torch.cat(rows)


def random_ids(length: int, vocab: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()
