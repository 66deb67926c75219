"""Another drafter, and prompt lookup where the text repeats itself. Implements `BlockDrafter` around one.

A learned drafter learns copying last and badly (the first draft of Gemma 3 270M's stands .46 of the time where the
target is certain); lookup copies for nothing and knows nothing else. Each block is one's or the other's, by how often
lookups came true in this very text: known before anything is drafted, so that either mode stays exact. Rows that are
looked up are left out of the drafter's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspark.messages import SparseDistribution
from dspark.models.drafters.calibration import setting_of
from services.draft.drafting import Block, BlockDrafter, Context, Drafted, Piece
from services.draft.ngram import CERTAIN, NgramContext, PromptLookup

__all__ = ["LookupContext", "WithLookup"]

TRUSTED = 0.65
"""Least trust in a lookup that is preferred to the drafter's block."""


@dataclass(slots=True)
class LookupContext:
    """A drafter's context of one sequence, and its ids, as far as they came."""

    own: Context
    ids: NgramContext
    complete: bool = True  # every position came with the id behind it

    @property
    def length(self) -> int:
        """As the drafter counts."""
        return self.own.length

    @property
    def copies(self) -> bool:
        """Whether the next block is looked up."""
        return self.complete and self.ids.trust >= TRUSTED


class WithLookup:
    """What a drafter drafts, but for texts that copy themselves."""

    def __init__(self, own: BlockDrafter[Any]) -> None:
        self.vocab_size = own.vocab_size
        self.block_size = own.block_size
        self.block_rows = own.block_rows
        self.feature_size = own.feature_size
        self.calibration = own.calibration
        self._own = own
        self._lengths = PromptLookup(own.vocab_size).lengths

    def open(self, limit: int) -> LookupContext:
        """As in `BlockDrafter`."""
        return LookupContext(self._own.open(limit), NgramContext(self._lengths))

    def extend(self, pieces: Sequence[Piece[LookupContext]], features: Tensor) -> None:
        """As in `BlockDrafter`. A sequence whose ids do not come is never looked up."""
        self._own.extend([Piece(piece.context.own, piece.count, piece.token_ids) for piece in pieces], features)
        for piece in pieces:
            piece.context.complete &= len(piece.token_ids) == piece.count
            if piece.context.complete:
                piece.context.ids.append(piece.token_ids)

    def draft(self, blocks: Sequence[Block[LookupContext]], count: int) -> Drafted:
        """As in `BlockDrafter`."""
        copied = [row for row, block in enumerate(blocks) if block.context.copies]
        rest = [row for row, block in enumerate(blocks) if not block.context.copies]
        if not copied:
            return self._draft(blocks, count)
        looked = _looked_up([blocks[row] for row in copied], count)
        if not rest:
            return looked
        return _joined(self._draft([blocks[row] for row in rest], count), looked, rest, copied)

    def _draft(self, blocks: Sequence[Block[LookupContext]], count: int) -> Drafted:
        own = [Block(block.anchor, block.context.own, block.sampling, block.wanted) for block in blocks]
        return self._own.draft(own, count)


def _looked_up(blocks: Sequence[Block[LookupContext]], count: int) -> Drafted:
    matches = [block.context.ids.lookup(count) for block in blocks]
    certain = [CERTAIN if setting_of(block.sampling) == "rejection" else None for block in blocks]
    trust = torch.tensor([block.context.ids.trust for block in blocks])
    return Drafted(
        tokens=torch.tensor([match.tokens for match in matches]),
        distributions=[certain] * count,
        confidence_logits=_log_odds(trust, torch.tensor([match.matched for match in matches]), count),
        lengths=[count] * len(blocks),
        settled=[True] * len(blocks),
    )


def _log_odds(trust: Tensor, matched: Tensor, count: int) -> Tensor:
    """(b, count) of c_k: that it fails shrinks with the ids that agree before it, those of the block included."""
    doubt = (1 - trust).clamp(1e-3, 1)[:, None]
    agreeing = matched[:, None].float()
    doubts = doubt * (agreeing + 2) / (agreeing + 2 + torch.arange(count))
    return torch.logit(1 - doubts)


def _joined(own: Drafted, looked: Drafted, rest: Sequence[int], copied: Sequence[int]) -> Drafted:
    """Both in the order of the batch. The logits that tokens were chosen from are known of one part only: left out."""
    size, count = len(rest) + len(copied), own.tokens.shape[1]
    tokens = own.tokens.new_empty(size, count)
    tokens[rest], tokens[copied] = own.tokens, looked.tokens.to(own.tokens.device)
    lengths = [count] * size
    for row, length in zip(rest, own.lengths or [count] * len(rest), strict=True):
        lengths[row] = length
    settled = [row in set(copied) for row in range(size)]
    distributions = [
        _merged(size, rest, ours, copied, theirs)
        for ours, theirs in zip(own.distributions, looked.distributions, strict=True)
    ]
    return replace(
        looked,
        tokens=tokens,
        distributions=distributions,
        confidence_logits=_logits(own, looked, rest, copied),
        others=None if own.others is None else _placed(own.others, tokens, rest),
        lengths=lengths,
        settled=settled,
    )


def _placed(others: Tensor, tokens: Tensor, rest: Sequence[int]) -> Tensor:
    """What would have been drafted next, of the rows that were drafted; nothing would of others."""
    placed = tokens.clone()
    placed[rest] = others
    return placed


def _merged(
    size: int,
    rest: Sequence[int],
    ours: Sequence[SparseDistribution | None],
    copied: Sequence[int],
    theirs: Sequence[SparseDistribution | None],
) -> list[SparseDistribution | None]:
    merged: list[SparseDistribution | None] = [None] * size
    for rows, values in ((rest, ours), (copied, theirs)):
        for row, value in zip(rows, values, strict=True):
            merged[row] = value
    return merged


def _logits(own: Drafted, looked: Drafted, rest: Sequence[int], copied: Sequence[int]) -> Tensor:
    """(b, n) float32; of a drafter without confidences NaN."""
    assert looked.confidence_logits is not None
    logits = torch.full((len(rest) + len(copied), looked.confidence_logits.shape[1]), torch.nan)
    if own.confidence_logits is not None:
        logits[rest] = own.confidence_logits.float().cpu()
    logits[copied] = looked.confidence_logits
    return logits
