"""A flattened ragged batch: rows of several sequences, prefill pieces and verify prefixes alike, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.errors import InternalError
from dspark.kernels.attention import NULL_PAGE, Span
from dspark.models.config import SLIDING
from dspark.models.kv_cache import CachedSequence


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Rows of a step: `token_ids` and `positions` (rows,) int64, and the spans and pages of each layer group.

    Sequence n of the batch has rows first_rows[n] … first_rows[n + 1] - 1. All positions are below `length`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    first_rows: tuple[int, ...]
    length: int
    spans: dict[str, list[Span]]
    page_size: int

    @property
    def rows(self) -> int:
        """Tokens in the batch."""
        return self.first_rows[-1]

    @classmethod
    def build(cls, items: Sequence[tuple[CachedSequence, Sequence[int], int]]) -> RaggedBatch:
        """Batch of (sequence, token ids, position of the first of them); no sequence twice.

        Gives the sequences the pages that these positions need. The positions before a sequence's first row must have
        been computed; of a fork, they may be rows of this batch.
        """
        if not items or not all(len(token_ids) for _, token_ids, _ in items):
            raise InternalError("a batch needs at least one sequence, and every sequence a row")
        cache = items[0][0].cache
        first_rows = [0]
        for sequence, token_ids, start in items:
            _check(sequence, start)
            cache.extend(sequence, start + len(token_ids))
            first_rows.append(first_rows[-1] + len(token_ids))
        positions = [p for _, token_ids, start in items for p in range(start, start + len(token_ids))]
        return cls(
            token_ids=torch.tensor([t for _, token_ids, _ in items for t in token_ids], device=cache.device),
            positions=torch.tensor(positions, device=cache.device),
            first_rows=tuple(first_rows),
            length=max(positions) + 1,
            spans={kind: _spans(kind, items, first_rows) for kind in cache.kinds},
            page_size=cache.page_size,
        )


def _check(sequence: CachedSequence, start: int) -> None:
    """Refuse to compute rows whose window has been freed: they would silently attend to nothing."""
    window = sequence.cache.window(SLIDING) if SLIDING in sequence.pages else None
    if start > sequence.computed_len:
        raise InternalError(f"rows start at {start}, but only {sequence.computed_len} positions are computed")
    if window is not None:
        first = max(0, start - window + 1) // sequence.cache.page_size
        if NULL_PAGE in sequence.pages[SLIDING][first:]:
            raise InternalError(f"the window of position {start} has been freed; open a new sequence to recompute it")


def _spans(
    kind: str, items: Sequence[tuple[CachedSequence, Sequence[int], int]], first_rows: Sequence[int]
) -> list[Span]:
    return [
        Span(
            first_row,
            start,
            len(token_ids),
            sequence.pages[kind],
            sequence.origin.pages[kind] if sequence.origin else (),
        )
        for (sequence, token_ids, start), first_row in zip(items, first_rows, strict=False)
    ]
