"""Draft layers and output head as they are served: a drafter's weights, arranged for speed (DSpark §2.2).

The same functions as the modules' own. What differs: weights are packed once, projections that read the same input are
one product, and every sequence attends to its own context where it lies, at its own length. On a CPU that is faster
than a padded batch as soon as lengths differ, and it copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dspark.kernels import Kernels
from dspark.kernels.linear import Linear
from dspark.models.config import RopeConfig
from dspark.models.drafters import Drafter
from dspark.models.drafters.layers import DraftLayer
from dspark.models.layers import RotaryTable
from services.draft.context import ContextKV, KVShape
from services.draft.kernels import draft_kernels
from services.draft.kernels.attention import Span

__all__ = ["DraftStack", "Rotary", "Span"]

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One draft layer. `qkv` is three projections in one; norms are float32, `qk_norm` (heads + kv heads, head_dim)."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor
    output: Linear
    mlp_norm: Tensor
    gated: Linear
    down: Linear


class DraftStack:
    """A drafter's layers, embedding, final norm and head. For one thread."""

    def __init__(self, drafter: Drafter, kernels: Kernels, block_rows: int) -> None:
        """`block_rows`: most rows that lie behind a context at once."""
        config = self.config = drafter.config
        self.kernels = kernels
        self.own_kernels = draft_kernels(kernels)
        self.dtype = drafter.norm.weight.dtype
        self.device = drafter.norm.weight.device
        self._shape = KVShape(config.num_layers, config.num_kv_heads, config.head_dim, block_rows)
        self._embed = drafter.embed_weight
        self._layers = [_arrange(layer, kernels) for layer in draft_layers(drafter)]
        thetas = dict.fromkeys(config.rope_thetas)
        self._rotary = {theta: RotaryTable(RopeConfig(theta), config.head_dim, self.device) for theta in thetas}
        self._final_norm = drafter.norm.weight.float()
        self._head = kernels.linear(drafter.head_weight)

    def open(self, limit: int) -> ContextKV:
        """An empty context of at most `limit` rows, a block's included."""
        return ContextKV(self._shape, limit, dtype=self.dtype, device=self.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The target's embedding of ids (…,), scaled as the target scales it: (…, d)."""
        return functional.embedding(token_ids, self._embed).to(self.dtype) * self.config.embedding_scale

    def rotary(self, positions: Tensor, end: int) -> list[Rotary]:
        """Per layer, cosines and sines for positions (n,), all below `end`."""
        rows = {theta: table(positions, end) for theta, table in self._rotary.items()}
        return [rows[theta] for theta in self.config.rope_thetas]

    def keys(self, index: int, keys: Tensor, rotary: Rotary) -> Tensor:
        """Projected keys (n, kv heads, head_dim) of a layer, normed and rotated."""
        weight = self._layers[index].qk_norm[self.config.num_heads :]
        return self.kernels.norm_rotary(keys, weight, self.config.rms_norm_eps, *rotary)

    def entering(self, index: int, x: Tensor) -> Tensor:
        """Rows (n, d) as the layer's projections read them."""
        return self.kernels.rms_norm(x, self._layers[index].input_norm, self.config.rms_norm_eps)

    def plan(self, spans: Sequence[Span], *, causal: bool = False) -> Any:
        """What all layers of one forward share, for spans that cover its rows.

        A row sees its context, all rows behind it, and of its own span's rows all, or with `causal` those up to itself.
        """
        group = self.config.num_heads // self.config.num_kv_heads
        return self.own_kernels.plan_block(spans, causal=causal, group=group)

    def through(self, index: int, x: Tensor, rotary: Rotary, plan: Any) -> Tensor:
        """Rows x (n, d) through one layer: (n, d). Their K/V is written behind the contexts of the plan's spans."""
        layer = self._layers[index]
        attended = layer.output(self._attend(index, self.entering(index, x), rotary, plan))
        x, normed = self.kernels.add_norm(x, attended, layer.mlp_norm, self.config.rms_norm_eps)
        return x + layer.down(layer.gated(normed))

    def normed(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.kernels.rms_norm(x, self._final_norm, self.config.rms_norm_eps)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Base logits U in float32, (…, d) -> (…, draft vocabulary)."""
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        return self._head(flat).view(*hidden.shape[:-1], -1).float()

    def _attend(self, index: int, normed: Tensor, rotary: Rotary, plan: Any) -> Tensor:
        """Attention of normed rows (n, d): (n, heads · head_dim)."""
        layer, config = self._layers[index], self.config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = layer.qkv(normed).view(len(normed), heads + 2 * kv_heads, dim)
        qk = self.kernels.norm_rotary(qkv[:, : heads + kv_heads], layer.qk_norm, config.rms_norm_eps, *rotary)
        keys, values = qk[:, heads:], qkv[:, heads + kv_heads :]
        return self.own_kernels.block_attention(qk[:, :heads], keys, values, plan, index)


def draft_layers(drafter: Drafter) -> list[DraftLayer]:
    """A drafter's layers, in order."""
    return [layer for layer in drafter.layers if isinstance(layer, DraftLayer)]


def _arrange(module: DraftLayer, kernels: Kernels) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    q_norm = attention.q_norm.weight.float().expand(attention.heads, -1)
    k_norm = attention.k_norm.weight.float().expand(attention.kv_heads, -1)
    activation = "gelu_tanh" if mlp.tanh_gelu else "silu"
    return _Layer(
        input_norm=module.input_layernorm.weight.float(),
        qkv=kernels.linear(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])),
        qk_norm=torch.cat([q_norm, k_norm]),
        output=kernels.linear(attention.o_proj.weight),
        mlp_norm=module.post_attention_layernorm.weight.float(),
        gated=kernels.gated(mlp.gate_proj.weight, mlp.up_proj.weight, activation),
        down=kernels.linear(mlp.down_proj.weight),
    )
