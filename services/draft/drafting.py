"""What the engine needs of a drafter, whatever its architecture: contexts that grow, and blocks behind them.

One implementation a file (`dspark`, `dflash`, `chain`, `ngram`), chosen once at load (`architectures`). Knows no
sequences by name, no requests and no messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dspark.errors import InvalidRequest
from dspark.messages import Sampling, SparseDistribution
from dspark.models.drafters.calibration import Calibration

__all__ = ["Block", "BlockDrafter", "Context", "Drafted", "Piece"]


class Context(Protocol):
    """What a drafter keeps of one sequence."""

    @property
    def length(self) -> int:
        """Positions 0 … length - 1 have come; a block's anchor sits at position `length`."""
        ...


ContextT = TypeVar("ContextT", bound=Context)


@dataclass(frozen=True, slots=True)
class Piece(Generic[ContextT]):
    """`count` further positions of a context. `token_ids` are the ids behind each of them, or () for who reads none."""

    context: ContextT
    count: int
    token_ids: Sequence[int] = ()

    def require_ids(self) -> Sequence[int]:
        """The ids; `InvalidRequest` unless there is one for each position."""
        if len(self.token_ids) != self.count:
            raise InvalidRequest(f"{self.count} positions came with {len(self.token_ids)} token ids")
        return self.token_ids


@dataclass(frozen=True, slots=True)
class Block(Generic[ContextT]):
    """Where a block starts: behind its context, with the anchor at position `context.length`.

    `wanted`: how many of its tokens anybody looks at; 0 for all.
    """

    anchor: int
    context: ContextT
    sampling: Sampling
    wanted: int = 0

    @property
    def committed_len(self) -> int:
        """N, which is also the position of the first draft token."""
        return self.context.length + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """b blocks of n tokens.

    `tokens`: (b, n) int64 target ids, of which row r has `lengths[r]`; None: all n. `distributions[k][r]`: what the
    k-th token of row r was drawn from, in rejection mode, empty where the token was certain. `confidence_logits`:
    (b, n) float32, before calibration and sigmoid; None where the drafter has no confidences.
    `others`: (b, n) int64, what would have been drafted in place of each token, next to it; the token itself where
    nothing would. None where nothing is known of it.
    `settled[r]`: row r's logits are log-odds as they are, and no calibration is for them; None: of no row.
    `logits[k]`: (b, draft vocabulary) float32, what the k-th tokens were chosen from: base + bias logits; `chosen[k]`:
    (b,) int64, their places in it. Both are empty where nothing was chosen from logits.
    """

    tokens: Tensor
    distributions: Sequence[Sequence[SparseDistribution | None]]
    confidence_logits: Tensor | None = None
    others: Tensor | None = None
    lengths: Sequence[int] | None = None
    settled: Sequence[bool] | None = None
    logits: Sequence[Tensor] = ()
    chosen: Sequence[Tensor] = ()

    def top_logits(self) -> Tensor:
        """(b, n) float32: base + bias logits of the chosen tokens."""
        pairs = zip(self.logits, self.chosen, strict=True)
        return torch.stack([logits.gather(1, chosen[:, None])[:, 0] for logits, chosen in pairs], 1)


class BlockDrafter(Protocol[ContextT]):
    """A drafter as the engine sees it. For one thread.

    Attributes:
        vocab_size: ids of the target are below this.
        block_size: most tokens of a block.
        block_rows: positions that a block itself takes behind its context; part of a context's `limit`.
        feature_size: width of a feature row; 0 for a drafter that reads ids only.
        calibration: how its confidence logits become probabilities, by setting.
    """

    vocab_size: int
    block_size: int
    block_rows: int
    feature_size: int
    calibration: tuple[Calibration, ...]

    def open(self, limit: int) -> ContextT:
        """An empty context that may grow to `limit` positions, a block's rows included."""
        ...

    def extend(self, pieces: Sequence[Piece[ContextT]], features: Tensor) -> None:
        """Take further positions of some contexts, each at most once, in order.

        `features`: their rows one piece after another, (n, feature_size) of any floating dtype. `OutOfPages` past a
        context's limit, `InvalidRequest` where ids are needed and missing.
        """
        ...

    def draft(self, blocks: Sequence[Block[ContextT]], count: int) -> Drafted:
        """The first `count` tokens of each block, at least 1 and at most `block_size`; contexts stay as they were.

        A token does not depend on the other blocks. Nor does it on how many are wanted, unless the drafter has shorter
        blocks for fewer (`DrafterConfig.cut_lengths`).
        """
        ...
