"""Torch reference of the sequential head over a whole block: token after token, and confidences (DSpark §3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark.kernels.linear import Linear
from dspark.messages import Sampling
from dspark.models.drafters.heads import ConfidenceHead, MarkovHead
from dspark.sampling import DraftChooser
from services.draft.drafting import Drafted

__all__ = ["ConfidenceRow", "SequentialHead", "draft_tokens", "unrolled"]


@dataclass(frozen=True, slots=True)
class ConfidenceRow:
    """The confidence head's one row, float32, cut by what it multiplies: h_k (d,) and, or None, W_1[x_{k-1}] (r,)."""

    hidden: Tensor
    previous: Tensor | None
    bias: Tensor

    @classmethod
    def of(cls, head: ConfidenceHead | None, width: int) -> ConfidenceRow | None:
        """The row of a head whose hidden states have `width` numbers."""
        if head is None:
            return None
        row = head.proj.weight[0].float().contiguous()
        return cls(row[:width], row[width:] if len(row) > width else None, head.proj.bias.float())

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Float32 logits of c_k (b, n) from h_k (b, n, d) and W_1[x_{k-1}] (b, n, r)."""
        rows = hidden.float() @ self.hidden + self.bias
        return rows if self.previous is None else rows + previous.float() @ self.previous


@dataclass(frozen=True, slots=True)
class SequentialHead:
    """A drafter's head as it is served: `bias` is x ↦ x · W_2ᵀ, `d2t` as `DraftChooser.choose` takes it.

    `remembered`: what kernels have laid out for blocks of a shape; weights stay where they are.
    """

    head: MarkovHead
    bias: Linear
    confidence: ConfidenceRow | None
    d2t: Tensor | None
    chooser: DraftChooser
    remembered: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)


@torch.inference_mode()
def draft_tokens(
    own: SequentialHead,
    base: Tensor,
    hidden: Tensor,
    anchors: Sequence[int],
    committed_lens: Sequence[int],
    samplings: Sequence[Sampling],
) -> Drafted:
    """Draft n tokens of b blocks, left to right.

    `base` (b, n, draft vocabulary) float32: base logits U_k; `hidden` (b, n, d): h_k. The k-th token (from 0) is for
    position N + k of a sequence with N committed tokens.
    """
    committed = torch.tensor(committed_lens, device=hidden.device)
    logits, choices = [], []

    def choose(k: int, bias: Tensor) -> Tensor:
        logits.append(base[:, k] + bias)
        choices.append(own.chooser.choose(logits[-1], samplings, committed + k, own.d2t, committed=committed))
        return choices[-1].tokens

    tokens, confidence_logits = unrolled(own, hidden, anchors, choose)
    return Drafted(
        tokens=tokens,
        distributions=[choice.distributions for choice in choices],
        confidence_logits=confidence_logits,
        others=torch.stack([choice.others for choice in choices], 1),
        logits=logits,
        chosen=[choice.draft_index for choice in choices],
    )


def unrolled(
    own: SequentialHead, hidden: Tensor, anchors: Sequence[int], choose: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Run the head left to right: tokens (b, n), and confidence logits (b, n) of a head that has them.

    `choose(k, bias)` gives the k-th tokens (b,) from their biases (b, draft vocabulary).
    """
    state, embedded = own.head.initial_state(len(anchors)), []
    tokens = [torch.tensor(anchors, device=hidden.device)]
    for k in range(hidden.shape[1]):
        embedded.append(own.head.previous(tokens[-1]))
        latent, state = own.head.latent(state, embedded[-1], hidden[:, k])
        tokens.append(choose(k, own.bias(latent)))
    confidence = own.confidence
    logits = None if confidence is None else confidence.logits(hidden, torch.stack(embedded, 1))
    return torch.stack(tokens[1:], 1), logits
