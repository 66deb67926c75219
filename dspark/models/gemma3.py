"""Gemma 3 (text): scaled embedding, sandwich norms, gelu, sliding and full attention layers."""

from __future__ import annotations

import torch

from dspark.kernels import Kernels
from dspark.models.layers import FeedForward, GroupStep, LayerWeights, SelfAttention

NORM_OFFSET = 1.0
"""Gemma's RMSNorms multiply by 1 + weight."""


def embedding_scale(hidden_size: int, dtype: torch.dtype) -> float:
    """√d, rounded to the weights' dtype as the model was trained."""
    return float(torch.tensor(hidden_size**0.5).to(dtype))


class Gemma3Layer:
    """One decoder layer."""

    def __init__(self, weights: LayerWeights, kernels: Kernels) -> None:
        self._attention = SelfAttention(weights, kernels)
        self._feed_forward = FeedForward(weights, kernels, "gelu_tanh")
        self.first_norm = weights.norm("input_layernorm")
        self._after_attention = weights.norm("post_attention_layernorm")
        self._before_feed_forward = weights.norm("pre_feedforward_layernorm")
        self._after_feed_forward = weights.norm("post_feedforward_layernorm")
        self._eps = weights.config.rms_norm_eps
        self._add_norm = kernels.add_norm

    def __call__(
        self, x: torch.Tensor, normed: torch.Tensor, step: GroupStep, storage: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DecoderLayer`."""
        attended = self._attention(normed, step, storage)
        x, normed = self._add_norm(x, attended, self._before_feed_forward, self._eps, self._after_attention)
        return self._add_norm(x, self._feed_forward(normed), following, self._eps, self._after_feed_forward)
