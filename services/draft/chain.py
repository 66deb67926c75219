"""Eagle3 and MTP as they are served: one small decoder step a draft token (`dspark.models.drafters.chain`).

Row t joins the feature at t with the token at t + 1, so the context's rows are made as features and ids come: all but
the last, which waits for the anchor and is the first row of a block. In the last layer a context row is nothing but its
keys and values. The rows that a block chains lie behind the context, where the next ones will land.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import ChainDrafter
from dspark.sampling import DraftChooser
from services.draft.context import ContextKV
from services.draft.drafting import Block, Drafted, Piece
from services.draft.layers import DraftStack, Span, draft_layers

__all__ = ["ChainBlocks", "ChainContext"]

_PIECE_ROWS = 512  # of one context in one forward: bounds what a long prompt takes


@dataclass(slots=True)
class ChainContext:
    """Rows of positions 0 … length - 2, and what the next row is made of: the last feature (d,) and the id behind it.

    A sequence whose anchor is its first token has no feature; zeros take its place.
    """

    kv: ContextKV
    feature: Tensor
    next_id: int | None = None

    @property
    def length(self) -> int:
        """Positions whose features are here."""
        return self.kv.length + (self.next_id is not None)

    def clear(self) -> None:
        """Start over from position 0."""
        self.kv.length, self.next_id = 0, None
        self.feature = torch.zeros_like(self.feature)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that can be made of one context: ids (n,) and features (n, d)."""

    kv: ContextKV
    next_ids: Sequence[int]
    features: Tensor


class ChainBlocks:
    """Drafts token by token over a batch. Implements `BlockDrafter`."""

    def __init__(self, drafter: ChainDrafter, chooser: DraftChooser, kernels: Kernels, positions: int) -> None:
        """`positions`: of all contexts together."""
        config = drafter.config
        self.vocab_size = config.vocab_size
        self.block_size = self.block_rows = config.block_size
        self.feature_size = config.hidden_size
        self.calibration = config.calibration
        self._stack = DraftStack(drafter, kernels, self.block_rows, positions)
        self._chooser = chooser
        self._d2t = drafter.d2t
        self._embed_norm = drafter.embed_norm.weight.float()
        self._feature_norm = drafter.feature_norm.weight.float()
        self._in = kernels.linear(drafter.in_proj.weight)
        last = draft_layers(drafter)[-1].self_attn
        self._last_kv = kernels.linear(torch.cat([last.k_proj.weight, last.v_proj.weight]))

    def open(self, limit: int) -> ChainContext:
        """As in `BlockDrafter`."""
        stack = self._stack
        return ChainContext(stack.open(limit), torch.zeros(self.feature_size, dtype=stack.dtype, device=stack.device))

    # ------------------------------------------------------------ context

    @torch.inference_mode()
    def extend(self, pieces: Sequence[Piece[ChainContext]], features: Tensor) -> None:
        """As in `BlockDrafter`; every position must come with the id behind it."""
        for piece in pieces:
            piece.require_ids()
            piece.context.kv.require(piece.context.length + piece.count)
        features = features.to(self._stack.device, self._stack.dtype)
        counts = [piece.count for piece in pieces]
        try:
            ready = [_take(piece, own) for piece, own in zip(pieces, torch.split(features, counts), strict=True)]
            for first in range(0, max(len(rows.next_ids) for rows in ready), _PIECE_ROWS):
                self._append([_cut(rows, first) for rows in ready if len(rows.next_ids) > first])
        except BaseException:
            for piece in pieces:
                piece.context.clear()  # rows and what waits for the next may not belong together any more
            raise

    def _append(self, parts: Sequence[_Rows]) -> None:
        """Rows of several contexts in one forward."""
        stack = self._stack
        spans = [Span(part.kv, len(part.next_ids)) for part in parts]
        plan = stack.plan(spans, causal=True)
        ranges = [range(span.context.length, span.context.length + span.count) for span in spans]
        positions = torch.tensor([position for one in ranges for position in one], device=stack.device)
        rotary = stack.rotary(positions, max(one.stop for one in ranges))
        ids = torch.tensor([token_id for part in parts for token_id in part.next_ids], device=stack.device)
        entering = stack.below_last(self._rows_in(ids, torch.cat([part.features for part in parts])), rotary, plan)
        config = stack.config
        kv = self._last_kv(entering).view(len(entering), 2, config.num_kv_heads, config.head_dim)
        last = config.num_layers - 1
        counts = [span.count for span in spans]
        keys = torch.split(stack.keys(last, kv[:, 0], rotary[last]), counts)
        for span, own_keys, own_values in zip(spans, keys, torch.split(kv[:, 1], counts), strict=True):
            span.context.put(last, own_keys, own_values)
            span.context.keep(span.count)

    def _rows_in(self, next_ids: Tensor, features: Tensor) -> Tensor:
        """What enters the first layer, (n, d), from the ids behind each position (n,) and features (n, d)."""
        stack = self._stack
        norm, eps = stack.kernels.rms_norm, stack.config.rms_norm_eps
        embedded = norm(stack.embed(next_ids).to(stack.dtype), self._embed_norm, eps)
        return self._in(torch.cat([embedded, norm(features, self._feature_norm, eps)], -1))

    # ------------------------------------------------------------ blocks

    @torch.inference_mode()
    def draft(self, blocks: Sequence[Block[ChainContext]], count: int) -> Drafted:
        """As in `BlockDrafter`: one step of all blocks together a token."""
        device = self._stack.device
        samplings = [block.sampling for block in blocks]
        committed = torch.tensor([block.committed_len for block in blocks], device=device)
        tokens = [torch.tensor([block.anchor for block in blocks], device=device)]
        features = torch.stack([block.context.feature for block in blocks])
        logits, chosen, distributions, others = [], [], [], []
        for k in range(count):
            features, normed = self._step(tokens[-1], features, [block.context.kv for block in blocks], k)
            logits.append(self._stack.base_logits(normed))
            choice = self._chooser.choose(logits[-1], samplings, committed + k, self._d2t, committed=committed)
            tokens.append(choice.tokens)
            chosen.append(choice.draft_index)
            distributions.append(choice.distributions)
            others.append(choice.others)
        return Drafted(
            tokens=torch.stack(tokens[1:], 1),
            distributions=distributions,
            others=torch.stack(others, 1),
            logits=logits,
            chosen=chosen,
        )

    def _step(self, tokens: Tensor, features: Tensor, contexts: Sequence[ContextKV], at: int) -> tuple[Tensor, Tensor]:
        """The next row of each chain, `at` rows behind its context: (b, d), before and after the final norm."""
        stack = self._stack
        positions = [context.length + at for context in contexts]
        rotary = stack.rotary(torch.tensor(positions, device=stack.device), max(positions) + 1)
        plan = stack.plan([Span(context, 1, at) for context in contexts])
        return stack.forward(self._rows_in(tokens, features), rotary, plan)


def _take(piece: Piece[ChainContext], features: Tensor) -> _Rows:
    """The rows that a piece completes; its last feature and id are left waiting in the context."""
    context, ids = piece.context, list(piece.token_ids)
    if context.next_id is not None:
        ids.insert(0, context.next_id)
        features = torch.cat([context.feature[None], features])
    context.feature, context.next_id = features[-1].clone(), ids[-1]
    return _Rows(context.kv, ids[:-1], features[:-1])


def _cut(rows: _Rows, first: int) -> _Rows:
    end = first + _PIECE_ROWS
    return _Rows(rows.kv, rows.next_ids[first:end], rows.features[first:end])
