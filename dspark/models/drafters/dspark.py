"""Parallel drafters: a whole block in one forward over injected target features (DSpark §2.2, §3.1).

A DSpark block anchored at position n reads features of positions 0 … n-1 and is fed the anchor and masks; the anchor's
row predicts token 1, and a sequential head ties the tokens together. A DFlash block is fed one mask more, its anchor's
row predicts nothing, and each token is chosen without knowledge of the one before. The same modules serve
(`context_kv`, `block_hidden`, one step of the head at a time) and are trained (`training_hidden`,
`sequential_logits`). Leaves files to `checkpoint`, and choosing tokens to `dspark.sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dspark.models.drafters.base import Drafter
from dspark.models.drafters.config import DrafterConfig
from dspark.models.drafters.heads import HEADS, ConfidenceHead, MarkovHead
from dspark.models.drafters.hints import HintInput, Hints
from dspark.models.drafters.layers import KV

__all__ = ["DFlashDrafter", "DSparkDrafter", "ParallelDrafter", "block_mask"]


class ParallelDrafter(Drafter):
    """The backbone: block rows that see the injected context and, in both directions, each other.

    `first_row` is the row of a block that predicts token 1; a block has `first_row` rows more than it has tokens.
    """

    first_row = 0

    def __init__(
        self, config: DrafterConfig, *, embed_weight: Tensor, head_weight: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__(config, embed_weight=embed_weight, head_weight=head_weight, d2t=d2t)
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if config.learned_mask else None
        self.hints = HintInput(config.hint_lengths, config.hidden_size) if config.hint_lengths else None

    @property
    def block_rows(self) -> int:
        """Rows of one block in the forward."""
        return self.config.block_size + self.first_row

    def context_kv(self, features: Tensor, positions: Tensor) -> list[KV]:
        """Per draft layer K (…, kv heads, head_dim), normed and rotated, and V; features (…, d), positions (…,)."""
        tables = self._rotary(positions, features.dtype)
        return [
            layer.self_attn.keys_values(features, table) for layer, table in zip(self._layers(), tables, strict=True)
        ]

    # ------------------------------------------------------------ blocks

    def block_hidden(
        self,
        anchors: Tensor,
        positions: Tensor,
        context: Sequence[KV],
        lengths: Tensor,
        hints: Hints | None = None,
    ) -> Tensor:
        """One forward of a block a row: (b, n, d) after the final norm, the rows that predict.

        `anchors` (b,) target ids at `positions` (b,). `context`: per draft layer K and V (b, L, kv heads, head_dim), of
        which row i sees the first `lengths[i]`; inside a block every row sees every row. `hints`: (b, n) and (b,), for
        a drafter that takes them.
        """
        b, block, longest = len(anchors), self.block_rows, context[0][0].shape[1]
        seen = torch.arange(longest, device=anchors.device) < lengths[:, None]
        own = torch.ones(b, block, dtype=torch.bool, device=anchors.device)
        mask = torch.cat([seen, own], 1)[:, None, None].expand(b, 1, block, longest + block)
        inputs = self._block_inputs(anchors, block, hints)
        rows = self._run(inputs, self._block_positions(positions, block), context, mask)
        return rows[:, self.first_row :]

    def training_hidden(
        self,
        captured: Tensor,
        token_ids: Tensor,
        anchors: Tensor,
        length: int | None = None,
        hints: Hints | None = None,
    ) -> Tensor:
        """As in `Drafter`."""
        s, a = anchors.shape
        block, t = (length or self.config.block_size) + self.first_row, captured.shape[1]
        positions = torch.arange(t, device=captured.device).expand(s, t)
        context = self.context_kv(self.features(captured), positions)
        inputs = self._block_inputs(token_ids.gather(1, anchors).flatten(), block, hints).view(s, a * block, -1)
        rows = self._block_positions(anchors.flatten(), block).view(s, a * block)
        mask = block_mask(anchors, block, t)
        return self._run(inputs, rows, context, mask).view(s, a, block, -1)[:, :, self.first_row :]

    # ------------------------------------------------------------ inside

    def _block_inputs(self, anchors: Tensor, rows: int, hints: Hints | None) -> Tensor:
        """Embeddings of anchor and masks, and what hints add to them, (b, rows, d)."""
        inputs = self._plain_inputs(anchors, rows)
        if self.hints is None:
            return inputs
        if hints is None:
            raise ValueError("this drafter takes hints, and none were given")
        guesses = self.embed(hints.tokens.reshape(len(anchors), -1)[:, :rows])
        return inputs + cast("Tensor", self.hints(guesses, hints.kinds.flatten()))

    def _plain_inputs(self, anchors: Tensor, rows: int) -> Tensor:
        masks = anchors.new_full((len(anchors), rows - 1), self.config.mask_token_id)
        if self.mask_embedding is None:
            return self.embed(torch.cat([anchors[:, None], masks], 1))
        anchor = self.embed(anchors)[:, None]
        return torch.cat([anchor, self.mask_embedding.to(anchor.dtype).expand(*masks.shape, -1)], 1)

    def _block_positions(self, positions: Tensor, rows: int) -> Tensor:
        return positions[:, None] + torch.arange(rows, device=positions.device)

    def _run(self, x: Tensor, positions: Tensor, context: Sequence[KV], mask: Tensor) -> Tensor:
        tables = self._rotary(positions, context[0][0].dtype)
        for layer, table, kv in zip(self._layers(), tables, context, strict=True):
            x = layer(x, table, kv, mask)
        return cast("Tensor", self.norm(x))


class DSparkDrafter(ParallelDrafter):
    """With a sequential head, and a confidence head where the config has one."""

    def __init__(
        self, config: DrafterConfig, *, embed_weight: Tensor, head_weight: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__(config, embed_weight=embed_weight, head_weight=head_weight, d2t=d2t)
        rank, width = config.markov_rank, config.hidden_size
        head = HEADS[config.markov_head_type]
        self.markov_head = head(config.markov_rows, config.draft_vocab_size, rank, width)
        self.markov_head.rows = self.rows
        confidence_rank = rank if config.confidence_with_markov else 0
        self.confidence_head = ConfidenceHead(width, confidence_rank) if config.confidence_head else None

    @property
    def head(self) -> MarkovHead:
        """The sequential head: `initial_state(b)`, `step(state, previous ids, h_k)`."""
        return self.markov_head

    def sequential_logits(self, previous: Tensor, hidden: Tensor) -> Tensor:
        """As in `Drafter`."""
        return cast("Tensor", self.markov_head.markov_w2(self.markov_head.unroll(previous, hidden)))

    def confidences(self, previous: Tensor, hidden: Tensor) -> Tensor | None:
        """As in `Drafter`; of any shape (…,) and (…, d)."""
        if self.confidence_head is None:
            return None
        return cast("Tensor", self.confidence_head(hidden, self.markov_head.previous(previous)))


class DFlashDrafter(ParallelDrafter):
    """Anchor and as many masks as tokens; the masks' rows predict (Chen et al., DFlash, 2026)."""

    first_row = 1


def block_mask(anchors: Tensor, block: int, context_length: int) -> Tensor:
    """Which keys the rows of many blocks see: (s, 1, a·n, t + a·n) bool, for anchor positions (s, a).

    Keys are t context positions, then the blocks' own rows: a row sees the context before its anchor and its own block.
    """
    s, a = anchors.shape
    before = torch.arange(context_length, device=anchors.device) < anchors[..., None]
    same = torch.eye(a, dtype=torch.bool, device=anchors.device).repeat_interleave(block, 1).expand(s, a, a * block)
    return torch.cat([before, same], -1).repeat_interleave(block, 1)[:, None]
