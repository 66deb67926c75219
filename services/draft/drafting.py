"""One block for each of many sequences: the parallel forward, then the sequential head left to right (DSpark §3.1).

Knows contexts and how tokens are chosen; leaves to the engine whose contexts they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.messages import Sampling, SparseDistribution
from dspark.models.drafters import DSparkDrafter
from dspark.sampling import DraftChooser
from services.draft.context import ContextKV
from services.draft.forward import DraftForward

__all__ = ["Block", "BlockDrafter", "Drafted"]


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block starts: behind its context, with the anchor at position `context.length`."""

    anchor: int
    context: ContextKV
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Drafted:
    """b blocks of n tokens.

    `tokens`: (b, n) int64 target ids. `confidence_logits`: (b, n) float32, before the sigmoid; None without that head.
    `logits[k]`: (b, draft vocabulary) float32, what the k-th tokens were chosen from: base + bias logits.
    `chosen[k]`: (b,) int64, the k-th tokens' places in it. `distributions[k][r]`: what the k-th token of row r was
    drawn from, in rejection mode.
    """

    tokens: Tensor
    confidence_logits: Tensor | None
    logits: Sequence[Tensor]
    chosen: Sequence[Tensor]
    distributions: Sequence[Sequence[SparseDistribution | None]]

    def top_logits(self) -> Tensor:
        """(b, n) float32: base + bias logits of the chosen tokens."""
        pairs = zip(self.logits, self.chosen, strict=True)
        return torch.stack([logits.gather(1, chosen[:, None])[:, 0] for logits, chosen in pairs], 1)


class BlockDrafter:
    """Drafts blocks. For one thread."""

    def __init__(self, drafter: DSparkDrafter, chooser: DraftChooser, kernels: Kernels) -> None:
        self.forward = DraftForward(drafter, kernels)
        self._drafter = drafter
        self._chooser = chooser

    @torch.inference_mode()
    def draft(self, blocks: Sequence[Block], count: int) -> Drafted:
        """The first `count` tokens of each block, `count` being at least 1 and at most the block size.

        The forward is always over the whole block, whose rows see each other, so that a token does not depend on how
        many are wanted.
        """
        device = self.forward.device
        anchors = torch.tensor([block.anchor for block in blocks], device=device)
        committed = torch.tensor([block.context.length + 1 for block in blocks], device=device)
        hidden = self.forward.block_hidden(anchors, [block.context for block in blocks])[:, :count]
        return self._unroll(hidden, anchors, committed, [block.sampling for block in blocks])

    def _unroll(self, hidden: Tensor, anchors: Tensor, committed: Tensor, samplings: Sequence[Sampling]) -> Drafted:
        """Choose token after token; the k-th (from 0) is for position N + k of a sequence with N committed tokens."""
        head, d2t, forward = self._drafter.head, self._drafter.d2t, self.forward
        base = forward.base_logits(hidden).float()
        state, tokens, embedded = head.initial_state(len(anchors)), [anchors], []
        logits, chosen, distributions = [], [], []
        for k in range(hidden.shape[1]):
            embedded.append(head.previous(tokens[-1]))
            latent, state = head.latent(state, embedded[-1], hidden[:, k])
            logits.append(base[:, k] + forward.bias_logits(latent))
            choice = self._chooser.choose(logits[-1], samplings, committed + k, d2t, committed=committed)
            tokens.append(choice.tokens)
            chosen.append(choice.draft_index)
            distributions.append(choice.distributions)
        confidence = forward.confidence_logits(hidden, torch.stack(embedded, 1))
        return Drafted(torch.stack(tokens[1:], 1), confidence, logits, chosen, distributions)
