"""Draft layers and output head as they are served: a drafter's weights, arranged for speed (DSpark §2.2).

The same functions as the modules' own. What differs: weights are packed once, projections that read the same input are
one product, every sequence attends to its own context where it lies, at its own length, and what layers do may be
remembered from one block to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from dspark.models.layers import GroupStep, RotaryTable
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

    def __init__(self, drafter: Drafter, kernels: Kernels, block_rows: int, positions: int) -> None:
        """`block_rows`: most rows that lie behind a context at once; `positions`: of all contexts together."""
        config = self.config = drafter.config
        self.kernels = kernels
        self.own_kernels = draft_kernels(kernels)
        self.dtype = drafter.norm.weight.dtype
        self.device = drafter.norm.weight.device
        shape = KVShape(config.num_layers, config.num_kv_heads, config.head_dim, block_rows)
        self._memory = self.own_kernels.memory(shape, positions, self.dtype, self.device)
        self._repeated = kernels.repeated()
        self._embed = drafter.embed_weight
        self._layers = [_arrange(layer, kernels, self.own_kernels.spiky) for layer in draft_layers(drafter)]
        self._k_norms = [layer.qk_norm[config.num_heads :] for layer in self._layers]
        thetas = dict.fromkeys(config.rope_thetas)
        self._rotary = {theta: RotaryTable(RopeConfig(theta), config.head_dim, self.device) for theta in thetas}
        self._final_norm = drafter.norm.weight.float()
        self._head = kernels.linear(drafter.head_weight)

    def open(self, limit: int) -> ContextKV:
        """An empty context of at most `limit` rows, a block's included."""
        return self._memory.open(limit)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The target's embedding of ids (…,), scaled as the target scales it: (…, d)."""
        return functional.embedding(token_ids, self._embed).to(self.dtype) * self.config.embedding_scale

    def rotary(self, positions: Tensor, end: int) -> list[Rotary]:
        """Per layer, cosines and sines for positions (n,), all below `end`."""
        rows = {theta: table(positions, end) for theta, table in self._rotary.items()}
        return [rows[theta] for theta in self.config.rope_thetas]

    def keys(self, index: int, keys: Tensor, rotary: Rotary) -> Tensor:
        """Projected keys (n, kv heads, head_dim) of a layer, normed and rotated."""
        return self.kernels.norm_rotary(keys, self._k_norms[index], self.config.rms_norm_eps, *rotary)

    def inject(self, projected: Tensor, rotary: Sequence[Rotary], pieces: Sequence[tuple[ContextKV, int]]) -> None:
        """Append K/V (n, layers, 2 · kv heads, D) to contexts, keys not yet normed and rotated.

        `pieces`: whose the rows are, in order, and how many. `OutOfPages` past a context's limit.
        """
        self.own_kernels.inject(projected, self._k_norms, self.config.rms_norm_eps, rotary, self._memory, pieces)

    def plan(self, spans: Sequence[Span], *, causal: bool = False) -> Any:
        """What all layers of one forward share, for spans that cover its rows.

        A row sees its context, all rows behind it, and of its own span's rows all, or with `causal` those up to itself.
        """
        group = self.config.num_heads // self.config.num_kv_heads
        return self.own_kernels.plan_block(spans, causal=causal, group=group)

    def forward(self, x: Tensor, rotary: Sequence[Rotary], plan: Any) -> tuple[Tensor, Tensor]:
        """Rows x (n, d) through all layers, and what comes out after the final norm, both (n, d).

        Their K/V is written behind the contexts of the plan's spans.
        """
        out, normed = self._repeated(self._through, x, self._steps(rotary, plan), self._memory.identity)
        return out, normed

    def below_last(self, x: Tensor, rotary: Sequence[Rotary], plan: Any) -> Tensor:
        """Rows (n, d) through all layers but the last, as its projections read them."""
        return self._run(x, self._steps(rotary, plan), self._layers[:-1], self._layers[-1].input_norm)[1]

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Base logits U in float32, (…, d) -> (…, draft vocabulary)."""
        flat = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        return self._head(flat).view(*hidden.shape[:-1], -1).float()

    def _steps(self, rotary: Sequence[Rotary], plan: Any) -> dict[str, GroupStep]:
        """What layers of one rotary base share."""
        return {str(theta): GroupStep(*own, plan) for theta, own in zip(self.config.rope_thetas, rotary, strict=True)}

    def _through(self, x: Tensor, steps: Mapping[str, GroupStep]) -> Sequence[Tensor]:
        return self._run(x, steps, self._layers, self._final_norm)

    def _run(
        self, x: Tensor, steps: Mapping[str, GroupStep], layers: Sequence[_Layer], final: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows through some layers, and what comes out after the norm `final`."""
        eps = self.config.rms_norm_eps
        norms = [*(layer.input_norm for layer in layers), final]
        normed = self.kernels.rms_norm(x, norms[0], eps)
        for index, (layer, norm) in enumerate(zip(layers, norms[1:], strict=True)):
            step = steps[str(self.config.rope_thetas[index])]
            attended = layer.output(self._attend(index, layer, normed, step))
            x, normed = self.kernels.add_norm(x, attended, layer.mlp_norm, eps)
            x, normed = self.kernels.add_norm(x, layer.down(layer.gated(normed)), norm, eps)
        return x, normed

    def _attend(self, index: int, layer: _Layer, normed: Tensor, step: GroupStep) -> Tensor:
        """Attention of normed rows (n, d): (n, heads · head_dim)."""
        config = self.config
        qkv = layer.qkv(normed).view(len(normed), -1, config.head_dim)
        return self.own_kernels.attend(
            qkv, layer.qk_norm, config.rms_norm_eps, step.cos, step.sin, self._memory, step.plan, index
        )


def draft_layers(drafter: Drafter) -> list[DraftLayer]:
    """A drafter's layers, in order."""
    return [layer for layer in drafter.layers if isinstance(layer, DraftLayer)]


def _arrange(module: DraftLayer, kernels: Kernels, spiky: Callable[[Tensor], Linear]) -> _Layer:
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
        down=spiky(mlp.down_proj.weight),
    )
