"""Linear layers over rows in float32 that read each weight once a step, in as few bytes as hold it.

Weights mostly are bfloat16, and stay so in memory, whatever is computed in. What a step of a few rows takes is reading
them, so half the bytes are half the time. Weights that bfloat16 would round (of quantised or float32 files) stay
float32. `rounded_linear` and `rounded_gated` round rows to bfloat16, too, for processors that multiply it: twice as
many products at once, sums in float32, and weights in fewer bits still where they can be (`short_llvm`). Rows keep
their bits by construction: see `tiles_llvm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dspark.kernels import team
from dspark.kernels.linear import Activation, Linear
from dspark.kernels.linear import gated as plain_gated
from dspark.kernels.linear import linear as plain_linear
from dspark.kernels.product_llvm import FEW_ROWS, Product, ProductArguments, compiled, plain_bytes
from dspark.kernels.rowwise_llvm import activated
from dspark.kernels.short_llvm import shortened
from dspark.kernels.tiles_llvm import GROUP, Tiling

__all__ = [
    "Streamed",
    "StreamedGated",
    "StreamedLinear",
    "gated",
    "in_panels",
    "linear",
    "rounded_gated",
    "rounded_linear",
]

_SHARES = 8  # that a thread takes of a product one by one, so that a disturbed thread leaves its rest to the others
_ALONE = 16 << 20  # rows times bytes of weights that one thread has done before a sleeping team would begin
_PART = 1 << 14  # outputs looked at together
_TILE = 12  # rows, a multiple of which is taken where there are too many
_MOST_ROOM = 32 << 20  # bytes of rounded rows at a time


def linear(weight: torch.Tensor) -> Linear:
    """The layer x ↦ x · weightᵀ for a weight (out, in), which may be freed afterwards."""
    return StreamedLinear(weight) if _streamable(weight) else plain_linear(weight)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """The layer x ↦ activation(x · gateᵀ) * (x · upᵀ)."""
    return StreamedGated(gate, up, activation) if _streamable(gate) else plain_gated(gate, up, activation)


def rounded_linear(weight: torch.Tensor) -> Linear:
    """As `linear`, where both are bfloat16 in a product: rows are rounded to it."""
    return StreamedLinear(weight, rounded=True) if _streamable(weight) else plain_linear(weight)


def rounded_gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """As `gated`, over rows rounded to bfloat16."""
    return StreamedGated(gate, up, activation, rounded=True) if _streamable(gate) else plain_gated(gate, up, activation)


def _streamable(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


class Streamed:
    """x (rows, in) ↦ (rows, out), both float32, by one of the compiled products over a weight in its panels."""

    def __init__(
        self,
        function: int,
        weight: torch.Tensor,
        shape: Sequence[int],
        tiling: Tiling,
        *,
        rounds: bool = False,
        beside: int = 0,
    ) -> None:
        """`rounds`: threads round rows to bfloat16 for themselves. `beside`: bytes that each needs beside many."""
        self._function, self._weight, self._rounds = function, weight, rounds
        self._outputs, self._inputs = shape
        self._groups = len(weight) // GROUP
        self._padded = self._groups * tiling.group_outputs
        self._beside = beside

    @property
    def one_row(self) -> tuple[int, Mapping[str, int]]:
        """The product, and its arguments for one row in one thread but for where things lie: whoever calls it says."""
        sizes = {"rows": 1, "inputs": self._inputs, "outputs": self._padded}
        return self._function, sizes | {
            "weight": self._weight.data_ptr(),
            "pieces": self._groups,
            "share": self._groups,
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        out = self.product(x.contiguous(), x.new_empty(x.shape[0], self._padded))
        return out if self._padded == self._outputs else out[:, : self._outputs].contiguous()

    @property
    def width(self) -> int:
        """Outputs of whole groups of panels."""
        return self._padded

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out), the outputs among what is written to `out` (rows, width); contiguous both."""
        return self.product(x.contiguous(), out)[:, : self._outputs]

    def product(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` (rows, outputs of whole groups of panels), filled; both are contiguous."""
        assert x.dtype == torch.float32
        return self.multiplied(x, None, out)

    def multiplied(
        self, x: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor, peaks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`out`, filled, from rows as the product reads them; `peaks`, where it has them, too."""
        assert out.dtype == torch.float32
        assert x.shape[1:] == (self._inputs,)
        assert out.shape[1] == self._padded
        beside, peak = (0 if given is None else given.data_ptr() for given in (scales, peaks))
        at = x.data_ptr(), beside, self._weight.data_ptr(), out.data_ptr(), peak
        if not self._rounds:
            self._run(*at, x.shape[0], 0, 0)
            return out
        row, threads = 2 * self._inputs, torch.get_num_threads()  # bytes, for each thread
        most = max(_TILE, _MOST_ROOM // (threads * row) // _TILE * _TILE)
        for first in range(0, x.shape[0], most):
            part, count = slice(first, first + most), min(most, x.shape[0] - first)
            room = count * row + (self._beside if count > FEW_ROWS else 0)
            rooms = x.new_empty(threads, room // 4)
            self._run(x[part].data_ptr(), 0, at[2], out[part].data_ptr(), 0, count, rooms.data_ptr(), room)
        return out

    def _run(self, x: int, scales: int, weight: int, out: int, peaks: int, rows: int, rooms: int, room: int) -> None:
        shares = _SHARES * torch.get_num_threads()
        halved = self._groups < shares
        pieces = 2 * self._groups if halved else self._groups
        work = pieces, int(halved), max(1, pieces // shares), rooms, room, 0, 0
        run = team.alone if rows * self.weight_bytes <= _ALONE else team.run
        run(self._function, ProductArguments(x, scales, weight, out, peaks, rows, self._inputs, self._padded, *work))


class StreamedLinear(Streamed):
    """A weight, in float32 or bfloat16, that bfloat16 holds exactly is kept in it, any other in float32.

    `rounded`: over the former, rows are rounded to bfloat16 where the processor multiplies that.
    """

    def __init__(self, weight: torch.Tensor, product: Product | None = None, *, rounded: bool = False) -> None:
        product = product or compiled()
        inputs = weight.shape[1]
        rounded = rounded and not inputs % product.tiling.lanes
        function, panels = _arranged(weight, product, rounded=rounded)
        short = function in {product.short4, product.short5}
        rounds, beside = short or function == product.dots, plain_bytes(inputs) if short else 0
        super().__init__(function, panels, weight.shape, product.tiling, rounds=rounds, beside=beside)


class StreamedGated:
    """A gated pair of linears; both are one product."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation, *, rounded: bool = False) -> None:
        self._both = StreamedLinear(torch.cat((gate, up)), rounded=rounded)
        self._size, self._activation = len(gate), activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        return activated(self._both(x), self._size, self._activation)


def _arranged(weight: torch.Tensor, product: Product, *, rounded: bool) -> tuple[int, torch.Tensor]:
    """A product's address, and the weight in the panels that it reads."""
    lanes, narrow = product.tiling.lanes, _bfloat16(weight)
    if narrow is None:
        return product.float32, _float32_panels(weight, lanes)
    if rounded and product.dots is not None:
        return _rounded_arranged(_paired_panels(narrow, lanes), product, product.dots)
    return product.bfloat16, _bfloat16_panels(narrow, lanes)


def _rounded_arranged(panels: torch.Tensor, product: Product, dots: int) -> tuple[int, torch.Tensor]:
    """The product over pairs of inputs, in fewer bits where that is possible."""
    short, five = (product.short4 is not None and shortened(panels)) or (None, False)
    function = product.short5 if five else product.short4
    return (dots, panels) if short is None or function is None else (function, short)


def _bfloat16(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in bfloat16, or None where that would round it."""
    if weight.dtype == torch.bfloat16:
        return weight
    narrow = torch.empty(weight.shape, dtype=torch.bfloat16)
    for start in range(0, len(weight), _PART):
        part = slice(start, start + _PART)
        if not torch.equal(narrow[part].copy_(weight[part]).float(), weight[part]):
            return None
    return narrow


def _bfloat16_panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """(out, in) ↦ (panels, in, lanes, 2) of 16 bits: outputs n and n + lanes of a panel lie beside each other."""
    return in_panels(weight.view(torch.int16), (2, lanes), (0, 3, 2, 1))


def _paired_panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """(out, in) ↦ (panels, in / 2, 2, lanes, 2) of 16 bits: two inputs of an output lie beside each other."""
    panels = in_panels(weight.view(torch.int32), (2, lanes), (0, 3, 1, 2))
    return panels.view(torch.int16).view(*panels.shape, 2)


def _float32_panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """(out, in) ↦ (panels, in, 2, lanes)."""
    return in_panels(weight, (2, lanes), (0, 3, 1, 2))


def in_panels(weight: torch.Tensor, shape: tuple[int, int], order: tuple[int, ...]) -> torch.Tensor:
    """(out, in) ↦ (panels, *shape, in) with dimensions in another order; whole groups, filled up with zeros."""
    outputs, inputs = weight.shape
    size = shape[0] * shape[1]
    missing = -outputs % (GROUP * size)
    if missing:
        weight = torch.cat((weight, weight.new_zeros(missing, inputs)))
    return weight.view(-1, *shape, inputs).permute(order).contiguous()
