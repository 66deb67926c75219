"""The drafter's arithmetic as it is served: the weights of `DSparkDrafter`, arranged for speed (DSpark §2.2, §3.1).

The same functions as the module's own `context_kv` and `block_hidden`. What differs: weights are packed once,
projections that read the same input are one product, and every sequence attends to its own context where it lies, at
its own length. On a CPU that is faster than a padded batch as soon as lengths differ, and it copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dspark.kernels import Kernels
from dspark.kernels.linear import Linear
from dspark.models.config import RopeConfig
from dspark.models.drafters import DSparkDrafter
from dspark.models.drafters.heads import ConfidenceHead
from dspark.models.drafters.layers import DraftLayer
from dspark.models.layers import RotaryTable
from services.draft.context import ContextKV, KVShape

__all__ = ["DraftForward"]

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


class DraftForward:
    """One forward a block, over contexts that stay in place. For one thread."""

    def __init__(self, drafter: DSparkDrafter, kernels: Kernels) -> None:
        config = self._config = drafter.config
        self._kernels = kernels
        self.shape = KVShape(config.num_layers, config.num_kv_heads, config.head_dim, config.block_size)
        self.dtype = drafter.norm.weight.dtype
        self.device = drafter.norm.weight.device
        self._embed = drafter.embed_weight
        self._masks = _mask_rows(drafter)
        modules = [layer for layer in drafter.layers if isinstance(layer, DraftLayer)]
        self._layers = [_arrange(module, kernels) for module in modules]
        thetas = dict.fromkeys(config.rope_thetas)
        self._rotary = {theta: RotaryTable(RopeConfig(theta), config.head_dim, self.device) for theta in thetas}
        projections = [p.weight for m in modules for p in (m.self_attn.k_proj, m.self_attn.v_proj)]
        self._context_kv = kernels.linear(torch.cat(projections))
        self._final_norm = drafter.norm.weight.float()
        self._head = kernels.linear(drafter.head_weight)
        self._bias = kernels.linear(drafter.head.markov_w2.weight)
        self._confidence = _Confidence.of(drafter.confidence_head, config.hidden_size)

    # ------------------------------------------------------------ context

    def context_kv(self, features: Tensor, positions: Tensor, end: int) -> list[tuple[Tensor, Tensor]]:
        """Per draft layer K (n, kv heads, head_dim), normed and rotated, and V, of features (n, d).

        `positions`: (n,), all below `end`.
        """
        config = self._config
        projected = self._context_kv(features).view(len(features), config.num_layers, 2, config.num_kv_heads, -1)
        rotary = self._rotary_rows(positions, end)
        return [
            (self._context_keys(layer, projected[:, index, 0], rotary[index]), projected[:, index, 1])
            for index, layer in enumerate(self._layers)
        ]

    def _context_keys(self, layer: _Layer, keys: Tensor, rotary: Rotary) -> Tensor:
        weight = layer.qk_norm[self._config.num_heads :]
        return self._kernels.norm_rotary(keys, weight, self._config.rms_norm_eps, *rotary)

    # ------------------------------------------------------------ blocks

    def block_hidden(self, anchors: Tensor, contexts: Sequence[ContextKV]) -> Tensor:
        """Rows (b, block, d) after the final norm, for blocks that start with `anchors` (b,) behind their contexts."""
        block, eps = self._config.block_size, self._config.rms_norm_eps
        starts = [context.length for context in contexts]
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(block, device=self.device)
        rotary = self._rotary_rows(positions.flatten(), max(starts) + block)
        x = self._inputs(anchors).flatten(0, 1)
        for index, layer in enumerate(self._layers):
            x = x + self._attend(index, x, rotary[index], contexts)
            x = x + layer.down(layer.gated(self._kernels.rms_norm(x, layer.mlp_norm, eps)))
        return self._kernels.rms_norm(x, self._final_norm, eps).view(len(anchors), block, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Base logits U, (b, n, d) -> (b, n, draft vocabulary)."""
        return self._head(hidden.flatten(0, 1).contiguous()).view(*hidden.shape[:2], -1)

    def bias_logits(self, latent: Tensor) -> Tensor:
        """B = W_2 z of the sequential head, (b, r) -> (b, draft vocabulary)."""
        return self._bias(latent)

    def confidence_logits(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Float32 logits of c_k (b, n) from h_k (b, n, d) and W_1[x_{k-1}] (b, n, r); None without that head."""
        if self._confidence is None:
            return None
        rows = hidden.float() @ self._confidence.hidden + self._confidence.bias
        rank = self._confidence.previous
        return rows if rank is None else rows + previous.float() @ rank

    def _inputs(self, anchors: Tensor) -> Tensor:
        """Embeddings of the anchor and of a mask at each further place, (b, block, d)."""
        anchor = functional.embedding(anchors, self._embed) * self._config.embedding_scale
        return torch.cat([anchor[:, None], self._masks.expand(len(anchors), -1, -1)], 1)

    def _rotary_rows(self, positions: Tensor, end: int) -> list[Rotary]:
        """Per draft layer, the tables' rows for positions (n,) below `end`."""
        rows = {theta: table(positions, end) for theta, table in self._rotary.items()}
        return [rows[theta] for theta in self._config.rope_thetas]

    def _attend(self, index: int, x: Tensor, rotary: Rotary, contexts: Sequence[ContextKV]) -> Tensor:
        """Attention of the blocks' rows x (b · block, d), each sequence over its own context and block."""
        layer, config = self._layers[index], self._config
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        normed = self._kernels.rms_norm(x, layer.input_norm, config.rms_norm_eps)
        qkv = layer.qkv(normed).view(len(x), heads + 2 * kv_heads, dim)
        qk = self._kernels.norm_rotary(qkv[:, : heads + kv_heads], layer.qk_norm, config.rms_norm_eps, *rotary)
        b, values = len(contexts), qkv[:, heads + kv_heads :]
        mixed = _attention(
            index,
            qk[:, :heads].reshape(b, -1, kv_heads, heads // kv_heads, dim),
            qk[:, heads:].reshape(b, -1, kv_heads, dim).transpose(1, 2),
            values.reshape(b, -1, kv_heads, dim).transpose(1, 2),
            contexts,
        )
        return layer.output(mixed.reshape(len(x), heads * dim))


def _attention(index: int, query: Tensor, keys: Tensor, values: Tensor, contexts: Sequence[ContextKV]) -> Tensor:
    """Attention over each sequence's context and block: (b, block, kv heads, group, D), from a query of that shape.

    Keys and values are (b, kv heads, block, D). The query heads that share a key/value head become rows of one product.
    There is no mask: a block sees all of its context and all of itself.
    """
    b, block, kv_heads, group, dim = query.shape
    folded = query.permute(0, 2, 3, 1, 4).reshape(b, kv_heads, group * block, dim)
    mixed = []
    for row, context in enumerate(contexts):
        all_keys, all_values = context.with_block(index, keys[row], values[row])
        mixed.append(functional.scaled_dot_product_attention(folded[row : row + 1], all_keys, all_values))
    joined = mixed[0] if b == 1 else torch.cat(mixed)
    return joined.view(b, kv_heads, group, block, dim).permute(0, 3, 1, 2, 4)


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


def _mask_rows(drafter: DSparkDrafter) -> Tensor:
    """What stands at the places behind the anchor, (block - 1, d)."""
    config = drafter.config
    if drafter.mask_embedding is not None:
        row = drafter.mask_embedding.detach().to(drafter.embed_weight.dtype)
    else:
        row = drafter.embed_weight[config.mask_token_id] * config.embedding_scale
    return row.expand(config.block_size - 1, -1)
