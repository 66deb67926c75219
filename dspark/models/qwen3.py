"""Qwen3 (dense): pre-norm layers, grouped-query attention with query and key norms, silu."""

from __future__ import annotations

import torch

from dspark.kernels import Kernels
from dspark.models.layers import FeedForward, GroupStep, LayerWeights, SelfAttention

NORM_OFFSET = 0.0


class Qwen3Layer:
    """One decoder layer."""

    def __init__(self, weights: LayerWeights, kernels: Kernels) -> None:
        self._attention = SelfAttention(weights, kernels)
        self._feed_forward = FeedForward(weights, kernels, "silu")
        self.first_norm = weights.norm("input_layernorm")
        self._before_feed_forward = weights.norm("post_attention_layernorm")
        self._eps = weights.config.rms_norm_eps
        self._add_norm = kernels.add_norm

    def __call__(
        self, x: torch.Tensor, normed: torch.Tensor, step: GroupStep, storage: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DecoderLayer`."""
        attended = self._attention(normed, step, storage)
        x, normed = self._add_norm(x, attended, self._before_feed_forward, self._eps)
        return self._add_norm(x, self._feed_forward(normed), following, self._eps)
