"""Parts that target models are made of: rotary tables, paged self-attention, and reading a layer's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.kernels import Kernels, Plan
from dspark.models.config import RopeConfig, TargetConfig
from dspark.models.weights import TensorSource

_TABLE_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What all layers of one group share in a step: rotary factors (rows, 1, D/2) float32 and the attention plan."""

    cos: torch.Tensor
    sin: torch.Tensor
    plan: Plan


class RotaryTable:
    """Cosines and sines by position, computed once in blocks: a position's bits do not depend on the batch."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._frequency = 1.0 / (rope.theta**exponent) / rope.factor
        self._device = device
        self._cos = self._sin = torch.empty(0, 1, head_dim // 2, device=device)

    def __call__(self, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (rows, 1, D/2) float32 of `positions` (rows,), all of them below `length`."""
        while length > self._cos.shape[0]:
            self._grow()
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _grow(self) -> None:
        start = self._cos.shape[0]
        positions = torch.arange(start, start + _TABLE_BLOCK, dtype=torch.float32)
        angles = (positions[:, None] * self._frequency)[:, None].to(self._device)
        self._cos = torch.cat((self._cos, angles.cos()))
        self._sin = torch.cat((self._sin, angles.sin()))


class LayerWeights:
    """Reads one layer's tensors; `offset` is added to RMSNorm weights (Gemma stores them without the 1)."""

    def __init__(self, source: TensorSource, layer: int, config: TargetConfig, dtype: torch.dtype, device: torch.device,
                 *, offset: float) -> None:  # fmt: skip
        self.config = config
        self._source, self._prefix = source, f"model.layers.{layer}."
        self._dtype, self._device, self._offset = dtype, device, offset

    def matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A weight matrix in the model's dtype."""
        return self._source.get(f"{self._prefix}{name}.weight", (rows, columns), self._dtype).to(self._device)

    def norm(self, name: str, size: int | None = None) -> torch.Tensor:
        """An RMSNorm's weight in float32."""
        name = f"{self._prefix}{name}.weight"
        weight = self._source.get(name, (size or self.config.hidden_size,), torch.float32)
        return (weight + self._offset).to(self._device)


class SelfAttention:
    """Paged self-attention with normalised, rotated queries and keys; q, k and v come from one product."""

    def __init__(self, weights: LayerWeights, kernels: Kernels) -> None:
        config = weights.config
        self._config, self._kernels = config, kernels
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        shapes = (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
        parts = [weights.matrix(f"self_attn.{name}", count * dim, config.hidden_size) for name, count in shapes]
        self._qkv = kernels.linear(torch.cat(parts))
        self._out = kernels.linear(weights.matrix("self_attn.o_proj", config.hidden_size, heads * dim))
        q_norm, k_norm = (weights.norm(f"self_attn.{name}", dim) for name in ("q_norm", "k_norm"))
        self._norm = torch.cat((q_norm.expand(heads, dim), k_norm.expand(kv_heads, dim)))

    def __call__(self, x: torch.Tensor, step: GroupStep, storage: torch.Tensor) -> torch.Tensor:
        """(rows, d) ↦ (rows, d); writes the rows' keys and values into `storage`, the layer's pages."""
        config, kernels = self._config, self._kernels
        qkv = self._qkv(x).view(x.shape[0], -1, config.head_dim)
        q = kernels.norm_rotary_write(qkv, self._norm, config.rms_norm_eps, step.cos, step.sin, storage, step.plan)
        return self._out(kernels.paged_attention(q, storage, step.plan, config.attention_scale))


class FeedForward:
    """down(activation(gate x) * up x)."""

    def __init__(self, weights: LayerWeights, kernels: Kernels, activation: str) -> None:
        inner, hidden = weights.config.intermediate_size, weights.config.hidden_size
        gate, up = (weights.matrix(f"mlp.{name}", inner, hidden) for name in ("gate_proj", "up_proj"))
        self._gated = kernels.gated(gate, up, activation)
        self._down = kernels.linear(weights.matrix("mlp.down_proj", hidden, inner))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, d) ↦ (rows, d)."""
        return self._down(self._gated(x))
