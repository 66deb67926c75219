"""DSpark as it is served: a parallel block, then the sequential head left to right, and confidences (DSpark §3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import DSparkDrafter
from dspark.models.drafters.heads import ConfidenceHead
from dspark.sampling import DraftChooser
from services.draft.context import ContextKV
from services.draft.drafting import Block, Drafted
from services.draft.forward import ParallelBlocks

__all__ = ["DSparkBlocks"]


@dataclass(frozen=True, slots=True)
class _Confidence:
    """The confidence head's one row, float32, cut by what it multiplies."""

    hidden: Tensor
    previous: Tensor | None
    bias: Tensor

    @classmethod
    def of(cls, head: ConfidenceHead | None, width: int) -> _Confidence | None:
        if head is None:
            return None
        row = head.proj.weight[0].float()
        return cls(row[:width], row[width:] if len(row) > width else None, head.proj.bias.float())

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Float32 logits of c_k (b, n) from h_k (b, n, d) and W_1[x_{k-1}] (b, n, r)."""
        rows = hidden.float() @ self.hidden + self.bias
        return rows if self.previous is None else rows + previous.float() @ self.previous


class DSparkBlocks(ParallelBlocks):
    """Drafts blocks whose tokens know the one before them."""

    def __init__(self, drafter: DSparkDrafter, chooser: DraftChooser, kernels: Kernels) -> None:
        super().__init__(drafter, kernels)
        self._chooser = chooser
        self._d2t = drafter.d2t
        self._head = drafter.head
        self._bias = kernels.linear(drafter.head.markov_w2.weight)
        self._confidence = _Confidence.of(drafter.confidence_head, drafter.config.hidden_size)

    def choose(self, hidden: Tensor, blocks: Sequence[Block[ContextKV]]) -> Drafted:
        """Token after token; the k-th (from 0) is for position N + k of a sequence with N committed tokens."""
        samplings = [block.sampling for block in blocks]
        committed = torch.tensor([block.committed_len for block in blocks], device=hidden.device)
        base = self.stack.base_logits(hidden)
        state, embedded = self._head.initial_state(len(blocks)), []
        tokens = [torch.tensor([block.anchor for block in blocks], device=hidden.device)]
        logits, chosen, distributions = [], [], []
        for k in range(hidden.shape[1]):
            embedded.append(self._head.previous(tokens[-1]))
            latent, state = self._head.latent(state, embedded[-1], hidden[:, k])
            logits.append(base[:, k] + self._bias(latent))
            choice = self._chooser.choose(logits[-1], samplings, committed + k, self._d2t, committed=committed)
            tokens.append(choice.tokens)
            chosen.append(choice.draft_index)
            distributions.append(choice.distributions)
        return Drafted(
            tokens=torch.stack(tokens[1:], 1),
            distributions=distributions,
            confidence_logits=self._confidences(hidden, embedded),
            logits=logits,
            chosen=chosen,
        )

    def _confidences(self, hidden: Tensor, embedded: Sequence[Tensor]) -> Tensor | None:
        return None if self._confidence is None else self._confidence.logits(hidden, torch.stack(tuple(embedded), 1))
