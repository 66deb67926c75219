"""DSpark as it is served: a parallel block, then the sequential head left to right, and confidences (DSpark §3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import DSparkDrafter
from dspark.sampling import DraftChooser
from services.draft.context import ContextKV
from services.draft.drafting import Block, Drafted
from services.draft.forward import ParallelBlocks
from services.draft.kernels.sequential import ConfidenceRow, SequentialHead, draft_tokens

__all__ = ["DSparkBlocks"]


class DSparkBlocks(ParallelBlocks):
    """Drafts blocks whose tokens know the one before them."""

    def __init__(self, drafter: DSparkDrafter, chooser: DraftChooser, kernels: Kernels, positions: int) -> None:
        """`positions`: of all contexts together."""
        super().__init__(drafter, kernels, positions)
        self._head = SequentialHead(
            head=drafter.head,
            bias=kernels.linear(drafter.head.markov_w2.weight),
            confidence=ConfidenceRow.of(drafter.confidence_head, drafter.config.hidden_size),
            d2t=drafter.d2t,
            chooser=chooser,
        )

        # A fused kernel chooses by itself; whoever brings a chooser of another kind wants it asked.
        own = type(chooser) is DraftChooser
        self._draft_tokens = self.stack.own_kernels.draft_tokens if own else draft_tokens

    def choose(self, hidden: Tensor, blocks: Sequence[Block[ContextKV]]) -> Drafted:
        """Token after token; the k-th (from 0) is for position N + k of a sequence with N committed tokens."""
        return self._draft_tokens(
            self._head,
            self.stack.base_logits(hidden),
            hidden,
            [block.anchor for block in blocks],
            [block.committed_len for block in blocks],
            [block.sampling for block in blocks],
        )
