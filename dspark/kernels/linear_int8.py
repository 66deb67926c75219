"""Linear layers over int8 weights on a CPU: half the bytes to stream, under a law of their own.

Weights are rounded per output channel to s8, rows as they come to u8 around 128 with a scale each, products are summed
in int32 (VNNI). Sums of integers are exact in any order, so a row's bits cannot depend on the others. About 1.2 %
relative error a layer on Gaussian numbers. Layers whose inputs are not whole vectors keep their weights.
"""

from __future__ import annotations

import torch

from dspark.kernels.linear import Activation, Linear
from dspark.kernels.linear_llvm import Streamed, in_panels, rounded_gated, rounded_linear
from dspark.kernels.product_llvm import compiled
from dspark.kernels.rowwise_llvm import activated, codes

__all__ = ["ZERO_POINT", "Int8Gated", "Int8Linear", "code_panels", "gated", "linear"]

_CHUNK = 1 << 14  # channels quantised at a time, in float32
ZERO_POINT = 128


def linear(weight: torch.Tensor) -> Linear:
    """The layer x ↦ x · weightᵀ for a weight (out, in), which may be freed afterwards."""
    return Int8Linear(weight) if _fits(weight) else rounded_linear(weight)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """The layer x ↦ activation(x · gateᵀ) * (x · upᵀ)."""
    return Int8Gated(gate, up, activation) if _fits(gate) else rounded_gated(gate, up, activation)


def _fits(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and not weight.shape[1] % compiled().tiling.lanes


class Int8Linear(Streamed):
    """x (rows, in) ↦ (rows, out), both float32."""

    def __init__(self, weight: torch.Tensor) -> None:
        product = compiled()
        assert product.codes is not None  # `multiplies_int8` was asked
        super().__init__(product.codes, _panels(weight, product.tiling.lanes), weight.shape, product.tiling)

    def product(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """As `Streamed.product`."""
        rows, scales = codes(x)
        return self.multiplied(rows, scales, out)


class Int8Gated:
    """A gated pair of linears; both are one product."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> None:
        self._both = Int8Linear(torch.cat((gate, up)))
        self._size, self._activation = len(gate), activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        return activated(self._both(x), self._size, self._activation)


def _panels(weight: torch.Tensor, lanes: int) -> torch.Tensor:
    """(out, in) ↦ (panels, bytes) as `forms_llvm.Codes` reads them."""
    quantised = torch.empty(weight.shape, dtype=torch.int8)
    taken, scales = torch.empty(len(weight), dtype=torch.int32), torch.empty(len(weight))
    for start in range(0, len(weight), _CHUNK):
        part = slice(start, start + _CHUNK)
        values = weight[part]
        scales[part] = own = values.abs().amax(1).div_(127).clamp_(min=1e-30)
        quantised[part] = (values / own[:, None]).round_()
        taken[part] = quantised[part].sum(1, dtype=torch.int32).mul_(-ZERO_POINT)
    return code_panels(quantised, taken, scales, lanes=lanes)


def code_panels(quantised: torch.Tensor, *behind: torch.Tensor, lanes: int) -> torch.Tensor:
    """Codes (out, in), and what lies behind a panel's, each (out,) of 32 bits, as (panels, 32-bit words)."""
    parts = (quantised, *(one[:, None] for one in behind))
    return torch.cat([in_panels(one.view(torch.int32), (2, lanes), (0, 3, 1, 2)).flatten(1) for one in parts], 1)
