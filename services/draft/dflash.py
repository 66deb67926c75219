"""DFlash as it is served: a parallel block whose tokens are chosen each for itself (Chen et al., 2026)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import DFlashDrafter
from dspark.sampling import DraftChooser
from services.draft.context import ContextKV
from services.draft.drafting import Block, Drafted
from services.draft.forward import ParallelBlocks

__all__ = ["DFlashBlocks"]


class DFlashBlocks(ParallelBlocks):
    """Drafts blocks without a sequential head; it has no confidences."""

    def __init__(self, drafter: DFlashDrafter, chooser: DraftChooser, kernels: Kernels, positions: int) -> None:
        """`positions`: of all contexts together."""
        super().__init__(drafter, kernels, positions)
        self._chooser = chooser
        self._d2t = drafter.d2t

    def choose(self, hidden: Tensor, blocks: Sequence[Block[ContextKV]]) -> Drafted:
        """All tokens of all blocks in one choice, for none depends on another."""
        b, n = hidden.shape[:2]
        logits = self.stack.base_logits(hidden)
        committed = torch.tensor([block.committed_len for block in blocks], device=hidden.device)[:, None].expand(b, n)
        positions = committed + torch.arange(n, device=hidden.device)
        samplings = [block.sampling for block in blocks for _ in range(n)]
        choice = self._chooser.choose(
            logits.flatten(0, 1), samplings, positions.flatten(), self._d2t, committed=committed.flatten()
        )
        return Drafted(
            tokens=choice.tokens.view(b, n),
            distributions=[choice.distributions[k::n] for k in range(n)],
            others=choice.others.view(b, n),
            logits=logits.unbind(1),
            chosen=choice.draft_index.view(b, n).unbind(1),
        )
