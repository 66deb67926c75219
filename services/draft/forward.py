"""Parallel drafters as they are served: context K/V from features, and a whole block in one forward (DSpark §2.2).

A drafter of this kind never runs on the context: each target feature row becomes one K/V row a draft layer ("KV
injection"). Leaves the choice of tokens to each architecture (`dspark`, `dflash`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dspark.kernels import Kernels
from dspark.models.drafters import ParallelDrafter
from services.draft.context import ContextKV
from services.draft.drafting import Block, Drafted, Piece
from services.draft.hints import ServedHints
from services.draft.layers import DraftStack, Span, draft_layers

__all__ = ["ParallelBlocks"]


class ParallelBlocks(ABC):
    """What parallel drafters share; `choose` is each one's own. Implements `BlockDrafter`."""

    def __init__(self, drafter: ParallelDrafter, kernels: Kernels, positions: int) -> None:
        """`positions`: of all contexts together."""
        config = drafter.config
        self.vocab_size = config.vocab_size
        self.block_size = config.block_size
        self.block_rows = drafter.block_rows
        self.feature_size = config.hidden_size
        self.calibration = config.calibration
        self.stack = DraftStack(drafter, kernels, drafter.block_rows, positions)
        self._first_row = drafter.first_row
        self._masks = _mask_rows(drafter)
        self._hints = None if drafter.hints is None else ServedHints(drafter, drafter.hints, kernels)
        projections = [p.weight for m in draft_layers(drafter) for p in (m.self_attn.k_proj, m.self_attn.v_proj)]
        self._context_kv = kernels.linear(torch.cat(projections))

    def open(self, limit: int) -> ContextKV:
        """As in `BlockDrafter`."""
        context = self.stack.open(limit)
        if self._hints is not None:
            context.ids = self._hints.open()
        return context

    @torch.inference_mode()
    def extend(self, pieces: Sequence[Piece[ContextKV]], features: Tensor) -> None:
        """As in `BlockDrafter`; ids are read for hints only."""
        ids = [piece.require_ids() if piece.context.ids is not None else () for piece in pieces]
        starts = [piece.context.length for piece in pieces]
        ranges = [range(start, start + piece.count) for start, piece in zip(starts, pieces, strict=True)]
        positions = torch.tensor([position for one in ranges for position in one], device=self.stack.device)
        projected = self._context_kv(features.to(self.stack.device, self.stack.dtype))
        projected = projected.view(len(features), self.stack.config.num_layers, -1, self.stack.config.head_dim)
        rotary = self.stack.rotary(positions, max(one.stop for one in ranges))
        self.stack.inject(projected, rotary, [(piece.context, piece.count) for piece in pieces])
        for piece, behind in zip(pieces, ids, strict=True):
            if piece.context.ids is not None:
                piece.context.ids.append(behind)

    @torch.inference_mode()
    def draft(self, blocks: Sequence[Block[ContextKV]], count: int) -> Drafted:
        """As in `BlockDrafter`. Blocks are of lengths that the drafter was trained with; rows of one see each other."""
        rows = [self._first_row + self.stack.config.cut(block.wanted or self.block_size) for block in blocks]
        hidden = self.block_hidden([block.anchor for block in blocks], [block.context for block in blocks], rows)
        end = self._first_row + count
        if hidden.shape[1] < end:  # somebody else in the batch wants more
            hidden = functional.pad(hidden, (0, 0, 0, end - hidden.shape[1]))
        return self.choose(hidden[:, self._first_row : end], blocks)

    @abstractmethod
    def choose(self, hidden: Tensor, blocks: Sequence[Block[ContextKV]]) -> Drafted:
        """Tokens from the rows that predict them, (b, n, d) after the final norm."""

    def block_hidden(self, anchors: Sequence[int], contexts: Sequence[ContextKV], rows: Sequence[int]) -> Tensor:
        """(b, most rows, d) after the final norm, of blocks of so many rows with `anchors` behind their contexts.

        Of a block with fewer rows than the longest the rest are zeros.
        """
        stack, longest = self.stack, max(rows)
        places = [row * longest + place for row, count in enumerate(rows) for place in range(count)]
        at = None if len(places) == longest * len(rows) else torch.tensor(places, device=stack.device)
        starts = [context.length for context in contexts]
        positions = torch.tensor(starts, device=stack.device)[:, None] + torch.arange(longest, device=stack.device)
        rotary = stack.rotary(_taken(positions.flatten(), at), max(starts) + longest)
        plan = stack.plan([Span(context, count) for context, count in zip(contexts, rows, strict=True)])
        x = _taken(self._inputs(torch.tensor(anchors, device=stack.device), contexts, longest).flatten(0, 1), at)
        _, x = stack.forward(x, rotary, plan)
        if at is not None:
            x = x.new_zeros(longest * len(rows), x.shape[-1]).index_copy_(0, at, x)
        return x.view(len(rows), longest, -1)

    def _inputs(self, anchors: Tensor, contexts: Sequence[ContextKV], rows: int) -> Tensor:
        """Embeddings of the anchor and of a mask at each further place, and what hints add, (b, rows, d)."""
        embedded, masks = self.stack.embed(anchors), self._masks[: rows - 1]
        if self._hints is None:
            return torch.cat([embedded[:, None], masks.expand(len(anchors), -1, -1)], 1)
        texts = [context.ids for context in contexts if context.ids is not None]
        assert len(texts) == len(contexts)
        inputs = self._hints.rows(texts, rows, self.stack.embed)
        inputs[:, 0] += embedded
        inputs[:, 1:] += masks
        return inputs


def _taken(rows: Tensor, at: Tensor | None) -> Tensor:
    """The rows at these places; None: all."""
    return rows if at is None else rows[at]


def _mask_rows(drafter: ParallelDrafter) -> Tensor:
    """What stands at the places behind the anchor, (block rows - 1, d)."""
    config, dtype = drafter.config, drafter.norm.weight.dtype
    if drafter.mask_embedding is not None:
        row = drafter.mask_embedding.detach().to(dtype)
    else:
        row = drafter.embed_weight[config.mask_token_id].to(dtype) * config.embedding_scale
    return row.expand(drafter.block_rows - 1, -1)
