"""Linear layers whose rows keep their bits whatever else is in the batch.

On a CPU the weight is laid out once for oneDNN, which is about twice as fast as laying it out at every call, gives
the same bits as the plain bf16 linear, and lets the activation run inside the product. Measured with torch 2.13: rows
are bit-equal from 2 to 700 rows. A single row over more than 1,024 inputs takes another kernel, whose bits differ, in
bf16 rarely enough to pass a test on well-behaved numbers. So fewer than four rows are padded to four, which cost no
more (a head of 262,144 outputs: 12.5 ms for one row, 13.9 for two, 11.4 for four). MKL's float32 product, which plain
`linear` calls, changes bits with the remainder of the row count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch.nn import functional

Activation = str
"""\"gelu_tanh\" or \"silu\"."""

_PACK_ROWS = 16
_MIN_ROWS = 4
_PLAIN_MULTIPLE = 16
_FUSED: dict[Activation, tuple[str, str]] = {"gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}
PLAIN_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


class Linear(Protocol):
    """x (rows, in) ↦ (rows, out), both contiguous and of the weight's dtype."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""


@runtime_checkable
class LinearInto(Linear, Protocol):
    """A layer that also writes where it is told to."""

    @property
    def width(self) -> int:
        """Numbers of a row that it writes, at least as many as it has outputs."""

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out), the outputs among what is written to `out` (rows, width); contiguous both."""


def linear(weight: torch.Tensor) -> Linear:
    """The layer x ↦ x · weightᵀ for a weight (out, in); the weight may be freed afterwards where it was packed."""
    return PackedLinear(weight) if _packable(weight) else PlainLinear(weight)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> Linear:
    """The layer x ↦ activation(x · gateᵀ) * (x · upᵀ), the first half of a gated feed-forward layer."""
    return PackedGated(gate, up, activation) if _packable(gate) else PlainGated(gate, up, activation)


class PackedLinear:
    """A linear layer over a weight in oneDNN's own layout (CPU)."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = _pack(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        return _padded(x, lambda rows: _product(rows, self._weight, "none", ""))


class PackedGated:
    """A gated pair of linears over packed weights; activation and product run inside oneDNN."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> None:
        self._gate, self._up = _pack(gate), _pack(up)
        self._attribute, self._algorithm = _FUSED[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        return _padded(x, self._apply)

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        active = _product(x, self._gate, self._attribute, self._algorithm)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, active, self._up, None, "mul")  # noqa: SLF001
        return result


class PlainLinear:
    """A linear layer by torch's own product; on a CPU, float32 rows are padded to a multiple of 16."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        missing = -x.shape[0] % _PLAIN_MULTIPLE if x.device.type == "cpu" else 0
        if not missing:
            return functional.linear(x, self._weight)
        return functional.linear(functional.pad(x, (0, 0, 0, missing)), self._weight)[: x.shape[0]]


class PlainGated:
    """A gated pair of linears by torch's own operators."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> None:
        self._gate, self._up = PlainLinear(gate), PlainLinear(up)
        self._activation = PLAIN_ACTIVATIONS[activation]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, in) ↦ (rows, out)."""
        return self._activation(self._gate(x)) * self._up(x)


@lru_cache(maxsize=8)
def fast_bf16(device: torch.device) -> bool:
    """Whether oneDNN multiplies bfloat16 on this device."""
    # The question has no public name.
    return device.type == "cpu" and _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def _packable(weight: torch.Tensor) -> bool:
    if weight.dtype == torch.bfloat16:
        return fast_bf16(weight.device)
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_onednn()


def _has_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)  # noqa: SLF001  # no public name
    return packed


def _product(x: torch.Tensor, weight: torch.Tensor, attribute: str, algorithm: str) -> torch.Tensor:
    operator = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001  # the operator has no public name
    result: torch.Tensor = operator(x, weight, None, attribute, [], algorithm)
    return result


def _padded(x: torch.Tensor, apply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    rows = x.shape[0]
    if rows >= _MIN_ROWS:
        return apply(x)
    if not rows:
        return apply(x.new_zeros(_MIN_ROWS, x.shape[1]))[:0]
    return apply(torch.cat((x, x[:1].expand(_MIN_ROWS - rows, -1))))[:rows]  # a fifth of what functional.pad takes
