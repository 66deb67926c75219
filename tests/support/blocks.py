"""Blocks of draft rows behind contexts."""

from __future__ import annotations

from typing import Any

import torch

from services.draft.context import ContextKV, KVShape
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
        self.operands = [
            randn(total, n, dim, seed=seed).to(dtype) for seed, n in enumerate((heads, kv_heads, kv_heads))
        ]

    def spans(self, device: torch.device) -> list[Span]:
        shape, spans = KVShape(LAYERS, self.kv_heads, self.dim, 40), []
        for seed, (length, at, count) in enumerate(self.lengths):
            context = ContextKV(shape, 2048, dtype=self.dtype, device=device)
            filled = length + at
            rows = [randn(filled, self.kv_heads, self.dim, seed=seed + 10).to(device, self.dtype)] * 2
            context.append([(rows[0], rows[1])] * LAYERS, 0, filled)
            context.length = length
            spans.append(Span(context, count, at))
        return spans

    def run(self, own: Any, device: torch.device, *, causal: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What comes out for layer 1, and what lies behind the contexts then."""
        spans = self.spans(device)
        plan = own.plan_block(spans, causal=causal, group=self.group)
        out = own.block_attention(*(t.to(device) for t in self.operands), plan, 1)
        ends = [(span, span.context.length + span.at + span.count) for span in spans]
        return out.cpu(), [span.context.layer_rows(1)[:, :, :end].cpu() for span, end in ends]
