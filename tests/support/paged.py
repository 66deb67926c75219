"""Numbers to compute with, and sequences in shuffled pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dspark.kernels import Kernels
from dspark.kernels.attention import Span

CPU = torch.device("cpu")
PAGE = 16


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wild(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of very different sizes: sums in another order round differently."""
    return (randn(*shape, seed=seed) * randn(*shape, seed=seed + 100).abs() ** 3).to(dtype)


class Pages:
    """Keys and values of some sequences in shuffled pages, and queries for their last positions."""

    def __init__(
        self, lengths: Sequence[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
    ) -> None:
        """`lengths`: (start, count) of each span."""
        self.heads, self.kv_heads, self.dim, self.dtype = heads, kv_heads, dim, dtype
        needed = [-(-(start + count) // PAGE) for start, count in lengths]
        order = (torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)) + 1).tolist()
        self.spans, row = [], 0
        for (start, count), pages in zip(lengths, needed, strict=True):
            self.spans.append(Span(row, start, count, [order.pop() for _ in range(pages)]))
            row += count
        self.storage = randn(2 * kv_heads, sum(needed) + 1, PAGE * dim, dtype=dtype)
        self.storage[:, 0] = 7.0  # nobody's page
        self.q = randn(row, heads, dim, seed=3, dtype=dtype)

    def plan(
        self, kernels: Kernels, window: int | None, device: torch.device, spans: Sequence[Span] | None = None
    ) -> Any:
        group = self.heads // self.kv_heads
        own: dict[str, Any] = {"page_size": PAGE, "window": window, "group": group, "dtype": self.dtype}
        return kernels.plan_attention(spans or self.spans, **own, device=device)

    def attend(
        self,
        kernels: Kernels,
        window: int | None,
        device: torch.device = CPU,
        spans: Sequence[Span] | None = None,
        rows: slice = slice(None),
    ) -> torch.Tensor:
        scale, storage = float(self.dim**-0.5), self.storage.to(device)
        plan = self.plan(kernels, window, device, spans)
        return kernels.paged_attention(self.q[rows].to(device), storage, plan, scale)
