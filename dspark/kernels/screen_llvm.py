"""Bounds on a head's logits by code compiled for the processor: see `screen`.

Rows are turned, coded and multiplied by compiled products whose bits depend on nothing else in the batch, and weights
on their way into memory by the same ones: a choice that rests on bounds is the same wherever these kernels run.
"""

from __future__ import annotations

import torch

from dspark.kernels.linear_int8 import ZERO_POINT, code_panels
from dspark.kernels.linear_llvm import Streamed, StreamedLinear
from dspark.kernels.product_llvm import compiled
from dspark.kernels.rowwise_llvm import bounded_codes
from dspark.kernels.screen import LEAST_OUTPUTS, PEAKED, block_of, hadamard, slack, strided

__all__ = ["ScreenedHead", "screen"]

_LEAST = 1e-18  # of a length: squares of what is far smaller are nothing
_CHUNK = 1 << 10  # outputs turned at a time, in float32
_MOST_INPUTS = 1 << 15  # whose products, in bytes, an int32 holds the sum of


def screen(weight: torch.Tensor) -> ScreenedHead | None:
    """The screen of a head (vocabulary, d), or None where its logits are computed at once.

    Of a small head, one that is not bfloat16, one with inputs that cannot be turned, or very many of them.
    """
    outputs, inputs = weight.shape
    large = outputs >= LEAST_OUTPUTS and inputs <= _MOST_INPUTS and block_of(inputs) is not None
    plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    able = compiled().bounded_codes is not None and compiled().dots is not None
    return ScreenedHead(weight) if large and plain and able else None


class ScreenedHead(Streamed):
    """A head in bytes, beside the table of its weights."""

    def __init__(self, table: torch.Tensor) -> None:
        product, block = compiled(), block_of(table.shape[1])
        assert block is not None
        assert product.bounded_codes is not None
        assert 2 * product.tiling.lanes == PEAKED  # outputs of a panel
        self.table, self._block = table, block
        self._turn = StreamedLinear(hadamard(block))
        self._slack = slack(table.shape[1])
        panels = code_panels(*self._codes(), lanes=product.tiling.lanes)
        super().__init__(product.bounded_codes, panels, table.shape, product.tiling)

    def above(self, x: torch.Tensor, out: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
        """As `Screen.above`."""
        assert peaks.shape == (len(x), self.width // PEAKED)
        assert peaks.is_contiguous()
        rows, figures = bounded_codes(self._turned(x.bfloat16().float()))
        figures[:, 2] += figures[:, 1] * self._slack
        bounds = self.multiplied(rows, figures, out, peaks)[:, : self._outputs]
        if self._outputs < self.width:
            self._leave_out(bounds, peaks)
        return bounds

    def _leave_out(self, bounds: torch.Tensor, peaks: torch.Tensor) -> None:
        """Of the peaks what is no token's."""
        whole, left = divmod(self._outputs, PEAKED)
        peaks[:, whole:] = -torch.inf
        if left:
            peaks[:, whole] = bounds[:, -left:].amax(1)

    def product(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As `Streamed.product`."""
        self.above(x, out, x.new_empty(len(x), self.width // PEAKED))
        return out

    def whole(self) -> StreamedLinear:
        """As `Screen.whole`."""
        return StreamedLinear(self.table, rounded=True)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return self._turn(strided(x, self._block)).view(len(x), -1)

    def _codes(self) -> tuple[torch.Tensor, ...]:
        """Codes of the weights, what 128 times them take from a sum, their units, errors and lengths."""
        quantised = torch.empty(self.table.shape, dtype=torch.int8)
        taken, figures = torch.empty(len(self.table), dtype=torch.int32), torch.empty(len(self.table), 3)
        for start in range(0, len(self.table), _CHUNK):
            part = slice(start, start + _CHUNK)
            codes, figures[part] = bounded_codes(self._turned(self.table[part].float()))
            quantised[part] = codes.bitwise_xor_(ZERO_POINT).view(torch.int8)
            taken[part] = quantised[part].sum(1, dtype=torch.int32).mul_(-ZERO_POINT)
        units, lengths, errors = figures.clamp_(min=_LEAST).div_(self._block).unbind(1)  # a power of two: not rounded
        return quantised, taken, units, errors, lengths + errors
