"""Blocks of draft rows behind contexts."""

from __future__ import annotations

from typing import Any

import torch

from services.draft.context import ContextMemory, KVShape
from services.draft.kernels.attention import Span

LAYERS = 2


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Blocks:
    """Contexts filled with something, and rows of blocks behind them."""

    def __init__(self, lengths: list[tuple[int, int, int]], *, heads: int = 4, kv_heads: int = 2, dim: int = 20,
                 dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        """`lengths`: context, rows that lie behind it already, and rows of the block."""
        self.lengths, self.kv_heads, self.dim, self.dtype = lengths, kv_heads, dim, dtype
        self.group = heads // kv_heads
        total = sum(count for _, _, count in lengths)
        self.qkv = randn(total, heads + 2 * kv_heads, dim).to(dtype)
        self.weight = 1 + randn(heads + kv_heads, dim, seed=1) / 4
        angles = randn(total, 1, dim // 2, seed=2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def memory(self, own: Any, device: torch.device) -> ContextMemory:
        """For contexts, in the way of an implementation."""
        shape = KVShape(LAYERS, self.kv_heads, self.dim, 40)
        made: ContextMemory = own.memory(shape, 1 << 14, self.dtype, device)
        return made

    def spans(self, memory: ContextMemory, device: torch.device) -> list[Span]:
        spans = []
        for seed, (length, at, count) in enumerate(self.lengths):
            context = memory.open(2048)
            filled = length + at
            rows = [randn(filled, self.kv_heads, self.dim, seed=seed + 10).to(device, self.dtype)] * 2
            context.append([(rows[0], rows[1])] * LAYERS, 0, filled)
            context.length = length
            spans.append(Span(context, count, at))
        return spans

    def attend(self, own: Any, memory: ContextMemory, spans: list[Span], rows: slice, *, causal: bool) -> torch.Tensor:
        """What comes out for some rows, those of the spans, in layer 1."""
        device = spans[0].context.layer_rows().device
        plan = own.plan_block(spans, causal=causal, group=self.group)
        cos, sin, qkv = (t[rows].to(device) for t in (self.cos, self.sin, self.qkv))
        out: torch.Tensor = own.attend(qkv, self.weight.to(device), 1e-6, cos, sin, memory, plan, 1)
        return out.cpu()

    def run(self, own: Any, device: torch.device, *, causal: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What comes out for layer 1, and what lies behind the contexts then."""
        memory = self.memory(own, device)
        spans = self.spans(memory, device)
        out = self.attend(own, memory, spans, slice(None), causal=causal)
        ends = [(span, span.context.length + span.at + span.count) for span in spans]
        return out, [span.context.layer_rows(1)[:, :, :end].cpu() for span, end in ends]
