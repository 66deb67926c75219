"""Linear layers over rows in float32 that read each weight once a step, in as few bytes as hold it.

For models that compute in float32 because the processor does not multiply bfloat16: their weights mostly are bfloat16
all the same, and stay so in memory. What a step of a few rows takes is reading them, so half the bytes are half the
time. Weights that bfloat16 would round (of quantised or float32 files) stay float32. Rows keep their bits by
construction: see `tiles_llvm`.
"""

from __future__ import annotations

import torch

from dspark.kernels import team
from dspark.kernels.linear import Activation, Linear
from dspark.kernels.linear import gated as plain_gated
from dspark.kernels.linear import linear as plain_linear
from dspark.kernels.rowwise_llvm import activated
from dspark.kernels.tiles_llvm import GROUP, Product, ProductArguments, compiled

__all__ = ["StreamedGated", "StreamedLinear", "gated", "linear"]

_SHARES = 8  # that a thread takes of a product one by one, so that a disturbed thread leaves its rest to the others
_ALONE = 16 << 20  # rows times bytes of weights that one thread has done before a sleeping team would begin
_PART = 1 << 14  # outputs looked at together


def linear(weight: torch.Tensor) -> Linear:
    """The layer x ↦ x · weightᵀ for a weight (out, in), which may be freed afterwards."""
    return StreamedLinear(weight) if _streamable(weight) else plain_linear(weight)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """The layer x ↦ activation(x · gateᵀ) * (x · upᵀ)."""
    return StreamedGated(gate, up, activation) if _streamable(gate) else plain_gated(gate, up, activation)


def _streamable(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


class StreamedLinear:
    """x (rows, in) ↦ (rows, out), both float32; a weight that bfloat16 holds exactly is kept in it."""

    def __init__(self, weight: torch.Tensor, product: Product | None = None) -> None:
        product = product or compiled()
        narrow = _bfloat16(weight)
        self._function = product.float32 if narrow is None else product.bfloat16
        lanes = product.tiling.lanes
        self._weight = _float32_panels(weight, lanes) if narrow is None else _bfloat16_panels(narrow, lanes)
        self._outputs, self._inputs = weight.shape
        self._groups = len(self._weight) // GROUP
        self._padded = len(self._weight) * 2 * lanes

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        out = self.product(x.contiguous(), x.new_empty(x.shape[0], self._padded))
        return out if self._padded == self._outputs else out[:, : self._outputs].contiguous()

    def product(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` (rows, outputs of whole groups of panels), filled; both are contiguous."""
        assert x.dtype == out.dtype == torch.float32
        assert x.shape[1:] == (self._inputs,)
        share = max(1, self._groups // (_SHARES * torch.get_num_threads()))
        at = x.data_ptr(), self._weight.data_ptr(), out.data_ptr()
        run = team.alone if len(x) * self.weight_bytes <= _ALONE else team.run
        run(self._function, ProductArguments(*at, len(x), self._inputs, out.shape[1], self._groups, share, 0))
        return out


class StreamedGated:
    """A gated pair of linears; both are one product."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> None:
        self._both = StreamedLinear(torch.cat((gate, up)))
        self._size, self._activation = len(gate), activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        return activated(self._both(x), self._size, self._activation)


def _bfloat16(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in bfloat16, or None where that would round it."""
    narrow = torch.empty(weight.shape, dtype=torch.bfloat16)
    for start in range(0, len(weight), _PART):
        part = slice(start, start + _PART)
        if not torch.equal(narrow[part].copy_(weight[part]).float(), weight[part]):
            return None
    return narrow


def _bfloat16_panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """(out, in) ↦ (panels, in, lanes, 2) of 16 bits: outputs n and n + lanes of a panel lie beside each other."""
    return _panels(weight.view(torch.int16), (2, lanes), (0, 3, 2, 1))


def _float32_panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """(out, in) ↦ (panels, in, 2, lanes)."""
    return _panels(weight, (2, lanes), (0, 3, 1, 2))


def _panels(weight: torch.Tensor, shape: tuple[int, int], order: tuple[int, ...]) -> torch.Tensor:
    outputs, inputs = weight.shape
    size = shape[0] * shape[1]
    missing = -outputs % (GROUP * size)
    if missing:
        weight = torch.cat((weight, weight.new_zeros(missing, inputs)))
    return weight.view(-1, *shape, inputs).permute(order).contiguous()
