"""Linear layers over int8 weights on a CPU: half the bytes to stream, under a law of their own.

Weights are rounded per output channel to s8, rows as they come to u8 around 128 with a scale each, products are summed
in int32 by oneDNN (VNNI). Sums of integers are exact in any order, so a row's bits cannot depend on the others. About
1.2 % relative error a layer on Gaussian numbers. Layers whose weights are not bfloat16 (taps) are torch's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dspark.errors import ConfigError
from dspark.kernels.linear import PLAIN_ACTIVATIONS, Activation, Linear
from dspark.kernels.linear import gated as plain_gated
from dspark.kernels.linear import linear as plain_linear

if TYPE_CHECKING:
    from dspark.kernels import Kernels

__all__ = ["Int8Gated", "Int8Linear", "gated", "linear", "with_int8_weights"]

_ZERO_POINT = 128
_REACH = 126.0  # of 127: a scale rounded to bfloat16 may be 1/512 too small
_CHUNK = 1 << 14  # channels quantised at a time, in float32


def with_int8_weights(kernels: Kernels, device: torch.device) -> Kernels:
    """The same kernels with int8 linears; another name, so another numerics fingerprint.

    `ConfigError` where the processor has no VNNI: other instructions saturate, or take hundreds of times as long.
    """
    if device.type != "cpu" or not torch.cpu._is_vnni_supported():  # noqa: SLF001  # has no public name
        raise ConfigError(f"weights: int8 needs a CPU with VNNI instructions, not this {device.type}")
    return replace(kernels, name=f"{kernels.name}-int8", linear=linear, gated=gated)


def linear(weight: torch.Tensor) -> Linear:
    """The layer x ↦ x · weightᵀ for a weight (out, in), which may be freed afterwards."""
    return Int8Linear(weight) if weight.dtype == torch.bfloat16 else plain_linear(weight)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """The layer x ↦ activation(x · gateᵀ) * (x · upᵀ)."""
    return Int8Gated(gate, up, activation) if gate.dtype == torch.bfloat16 else plain_gated(gate, up, activation)


class Int8Linear:
    """x (rows, in) ↦ (rows, out), both bfloat16."""

    def __init__(self, weight: torch.Tensor) -> None:
        quantised = torch.empty(weight.shape, dtype=torch.int8)
        self._scales = torch.empty(len(weight))
        for start in range(0, len(weight), _CHUNK):
            part = slice(start, start + _CHUNK)
            values = weight[part].float()
            self._scales[part] = scales = values.abs().amax(1).div_(127).clamp_(min=1e-30)
            quantised[part] = values.div_(scales[:, None]).round_()
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        codes, scales = quantised_rows(x)
        weight = self._weight, self._scales, self._zero_points
        operator = torch.ops.onednn.qlinear_pointwise.default
        result: torch.Tensor = operator(codes, 1.0, _ZERO_POINT, *weight, None, 1.0, 0, x.dtype, "none", [], "")
        return result.mul_(scales)


class Int8Gated:
    """A gated pair of linears; both are one product."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> None:
        self._both = Int8Linear(torch.cat((gate, up)))
        self._activation = PLAIN_ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        gate, up = self._both(x).chunk(2, -1)
        return self._activation(gate) * up


def quantised_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, d) as uint8 codes around 128, and the scales (n, 1), bfloat16, by which they were divided."""
    scales = x.abs().amax(-1, keepdim=True).mul_(1 / _REACH).clamp_(min=1e-30)
    return x.float().div_(scales).add_(_ZERO_POINT + 0.5).to(torch.uint8), scales
