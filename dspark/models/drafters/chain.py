"""Autoregressive drafters: a small decoder that runs once a draft token, Eagle3 and MTP.

Row t joins the token at position t + 1 with the target's feature at t and predicts the token at t + 2:
x_t = W_in [norm(E[token_{t+1}]); norm(g_t)], then decoder layers that see rows 0 … t. Past the last feature the row's
own output takes the place of g. A block anchored at n starts with row n - 1 (the anchor's embedding and the last
feature), which predicts draft token 1. Eagle3 (Li et al., EAGLE-3, 2025) is one layer trained on chains as long as
those it drafts, its "training-time test"; MTP (DeepSeek-V3, 2024) is trained one step ahead and chained all the same.

Leaves files to `checkpoint`, and choosing tokens to `dspark.sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dspark.models.drafters.base import Drafter
from dspark.models.drafters.config import DrafterConfig
from dspark.models.drafters.hints import Hints
from dspark.models.drafters.layers import KV, DraftLayer, RmsNorm, Rotary

__all__ = ["ChainDrafter"]


class ChainDrafter(Drafter):
    """Decoder layers over pairs of feature and next token."""

    def __init__(
        self, config: DrafterConfig, *, embed_weight: Tensor, head_weight: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__(config, embed_weight=embed_weight, head_weight=head_weight, d2t=d2t)
        width = config.hidden_size
        self.embed_norm = RmsNorm(width, config.rms_norm_eps)
        self.feature_norm = RmsNorm(width, config.rms_norm_eps)
        self.in_proj = nn.Linear(2 * width, width, bias=False)

    @property
    def steps(self) -> int:
        """Steps of a chain that `training_hidden` takes: MTP is trained on the first only, and judged on all."""
        return 1 if self.training and self.config.architecture == "mtp" else self.config.block_size

    def rows_in(self, next_tokens: Tensor, features: Tensor) -> Tensor:
        """Input rows (…, d) from the ids behind each position (…,) and features (…, d)."""
        embedded = self.embed_norm(self.embed(next_tokens).to(features.dtype))
        return cast("Tensor", self.in_proj(torch.cat([embedded, self.feature_norm(features)], -1)))

    def training_hidden(
        self,
        captured: Tensor,
        token_ids: Tensor,
        anchors: Tensor,
        length: int | None = None,
        hints: Hints | None = None,
    ) -> Tensor:
        """As in `Drafter`, but of at most `steps` tokens."""
        del hints
        outputs, context = self.context_rows(self.features(captured), token_ids)
        last = anchors - 1
        y = outputs.gather(1, last[..., None].expand(-1, -1, outputs.shape[-1]))
        chain = Chain(context, last)
        hidden = [y]
        for step in range(1, min(self.steps, length or self.steps)):
            at = (anchors + step).clamp(max=token_ids.shape[1] - 1)
            y = self._advance(self.rows_in(token_ids.gather(1, at), y), last + step, chain)
            hidden.append(y)
        return cast("Tensor", self.norm(torch.stack(hidden, 2)))

    def context_rows(self, features: Tensor, token_ids: Tensor) -> tuple[Tensor, list[KV]]:
        """Rows 0 … t - 1 of whole sequences: the last layer's outputs (s, t, d), and each layer's K and V.

        `features` (s, t, d), `token_ids` (s, t); the last row has no next token and is given its own.
        """
        t = token_ids.shape[1]
        x = self.rows_in(torch.cat([token_ids[:, 1:], token_ids[:, -1:]], 1), features)
        tables = self._rotary(torch.arange(t, device=x.device).expand(len(x), t), x.dtype)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()[None, None]
        context = []
        for layer, table in zip(self._layers(), tables, strict=True):
            context.append(layer.keys_values(x, table))
            x = layer(x, table, _nothing(context[-1]), mask)
        return x, context

    def _advance(self, x: Tensor, positions: Tensor, chain: Chain) -> Tensor:
        """One step of many chains of each sequence: (s, a, d) -> (s, a, d)."""
        tables = self._rotary(positions, x.dtype)
        for index, (layer, table) in enumerate(zip(self._layers(), tables, strict=True)):
            x = chain.through(index, layer, x, table)
        return x


class Chain:
    """K/V that a step of a chain sees: context rows up to the anchor's, and the chain's own rows so far."""

    def __init__(self, context: Sequence[KV], last: Tensor) -> None:
        """`context`: per layer K and V (s, t, kv heads, D); `last` (s, a), the last context row each chain sees."""
        self._context = context
        self._own: list[list[KV]] = [[] for _ in context]
        t = context[0][0].shape[1]
        self._seen = torch.arange(t, device=last.device) <= last[..., None]

    def through(self, index: int, layer: DraftLayer, x: Tensor, rotary: Rotary) -> Tensor:
        """Rows x (s, a, d) through one layer; their own K/V is kept for the steps after."""
        before = self._own[index]
        keys, values = zip(self._context[index], *before, strict=True)
        a = x.shape[1]
        same = torch.eye(a, dtype=torch.bool, device=x.device).expand(len(x), a, a)
        mask = torch.cat([self._seen, *[same] * (len(before) + 1)], -1)[:, None]
        before.append(layer.keys_values(x, rotary))
        return cast("Tensor", layer(x, rotary, (torch.cat(keys, 1), torch.cat(values, 1)), mask))


def _nothing(like: KV) -> KV:
    """No context: (s, 0, kv heads, D)."""
    return like[0][:, :0], like[1][:, :0]
