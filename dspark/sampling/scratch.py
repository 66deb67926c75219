"""Large buffers that live on between calls.

A fresh float32 row of 262k logits costs 0.7 ms in page faults on a CPU, more than everything computed on it.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["scratch"]


class Scratch(threading.local):
    """Named buffers, one set a thread, grown when needed. What a name last held is lost when it is taken."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(
        self, name: str, rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Uninitialised (rows, width); on a GPU fresh, its allocator keeps memory anyway."""
        if device.type != "cpu":
            return torch.empty(rows, width, device=device, dtype=dtype)
        held = self._held.get(name)
        if held is None or held.numel() < rows * width:
            with torch.inference_mode(False):  # usable inside and outside inference mode
                held = self._held[name] = torch.empty(rows * width, dtype=dtype)
        return held[: rows * width].view(rows, width)


scratch = Scratch()
"""This package's buffers. A name belongs to one module and has one dtype."""
