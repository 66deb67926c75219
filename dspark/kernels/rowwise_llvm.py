"""Norms, rotary embedding and gated activations of float32 rows, by code compiled for the processor.

Rows that are not float32, and weights that differ by head, are torch's: `reference` and `fused`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import torch

from dspark.kernels import fused, reference, rows_llvm, team
from dspark.kernels.parts_llvm import host_lanes
from dspark.kernels.rows_llvm import (
    ActivationArguments,
    CodeArguments,
    CopyArguments,
    NormArguments,
    RotaryArguments,
    TurnedArguments,
)

__all__ = [
    "activated",
    "add_norm",
    "bounded_codes",
    "code_row",
    "codes",
    "norm_rotary",
    "norm_rotary_write",
    "rms_norm",
]

_STORED = {torch.float32: "norm_rotary_write", torch.bfloat16: "norm_rotary_round"}
_SHARE = 8  # copies that a thread takes at a time
_ALONE = 1 << 14  # numbers that one thread has done before a team would begin


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `reference.rms_norm`."""
    if not _plain(x, weight):
        return reference.rms_norm(x, weight, eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    addresses = x.data_ptr(), 0, 0, out.data_ptr(), weight.data_ptr(), 0
    _run("rms_norm", x.shape[-1], NormArguments, *addresses, x.shape[-1], eps, rows=x.numel() // x.shape[-1])
    return out


def add_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, y_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.add_norm`."""
    if not all(_plain(*pair) for pair in ((x, weight), (y, weight if y_weight is None else y_weight))):
        return fused.add_norm(x, y, weight, eps, y_weight)
    assert x.shape == y.shape
    x, y = x.contiguous(), y.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    name, own = ("add_norm", 0) if y_weight is None else ("add_normed_norm", y_weight.data_ptr())
    addresses = x.data_ptr(), y.data_ptr(), total.data_ptr(), out.data_ptr(), weight.data_ptr(), own
    _run(name, x.shape[-1], NormArguments, *addresses, x.shape[-1], eps, rows=x.numel() // x.shape[-1])
    return total, out


def norm_rotary(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """As `reference.norm_rotary`."""
    rows, heads, size = x.shape
    flat = x.stride()[1:] == (size, 1) and weight.shape == (heads, size) and weight.is_contiguous()
    if not flat or any(t.dtype != torch.float32 for t in (x, weight, cos, sin)):
        return reference.norm_rotary(x, weight, eps, cos, sin)
    out = x.new_empty(rows, heads, size)
    addresses = (t.data_ptr() for t in (x, weight, cos, sin, out))
    sizes = heads, size, x.stride(0)
    _run("norm_rotary", size // 2, TurnedArguments, *addresses, *sizes, eps, rows=rows, width=heads * size)
    return out


def norm_rotary_write(
    qkv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    storage: torch.Tensor,
    plan: Any,
) -> torch.Tensor:
    """As `fused.norm_rotary_write`; `storage` may be bfloat16 as well, to which keys and values are rounded."""
    if qkv.dtype != torch.float32:
        return fused.norm_rotary_write(qkv, weight, eps, cos, sin, storage, plan)
    assert weight.dtype == cos.dtype == sin.dtype == torch.float32
    assert storage.dtype in _STORED
    rows, _, size = qkv.shape
    kv_heads = storage.shape[0] // 2
    heads = len(weight) - kv_heads
    qkv, q = qkv.contiguous(), qkv.new_empty(rows, heads, size)
    addresses = (t.data_ptr() for t in (qkv, weight, cos, sin, q, storage, plan.slots))
    sizes = heads, kv_heads, size, storage.stride(0)
    _run(_STORED[storage.dtype], size // 2, RotaryArguments, *addresses, *sizes, eps, rows=rows, width=qkv[0].numel())
    if plan.copied is not None:
        _copy(storage, plan.copied, plan.copies, size * storage.itemsize // 4)
    return q


def _copy(storage: torch.Tensor, copied: tuple[torch.Tensor, torch.Tensor], count: torch.Tensor, size: int) -> None:
    """As `attention.copy_rows`, of rows of `size` float32s; in a thread of its own, as they are few."""
    lanes = math.gcd(size, host_lanes())
    addresses = storage.data_ptr(), copied[0].data_ptr(), copied[1].data_ptr(), count.data_ptr()
    sizes = len(storage), size, storage.stride(0) * storage.itemsize // 4
    team.alone(rows_llvm.compiled(lanes).functions["copy_rows"], CopyArguments(*addresses, *sizes, _SHARE, 0))


def activated(both: torch.Tensor, size: int, activation: str) -> torch.Tensor:
    """activation(gate) * up (rows, size), where a row of `both`, contiguous, has gate and up one behind the other."""
    out = both.new_empty(len(both), size)
    sizes = size, both.shape[1]
    _run(activation, size, ActivationArguments, both.data_ptr(), out.data_ptr(), *sizes, rows=len(both))
    return out


def codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (n, d) float32, contiguous, as uint8 around 128, and the scales (n,) by which they were divided."""
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    out, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x))
    addresses = x.data_ptr(), out.data_ptr(), scales.data_ptr()
    _run("codes", x.shape[1], CodeArguments, *addresses, x.shape[1], rows=len(x))
    return out, scales


def code_row(inputs: int) -> tuple[int, Mapping[str, int]]:
    """The function of `codes`, and its arguments for one row in one thread but for where things lie."""
    function = rows_llvm.compiled(math.gcd(inputs, host_lanes())).functions["codes"]
    return function, {"size": inputs, "rows": 1, "share": 1}


def bounded_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `codes`, with (n, 3) float32: scales, lengths of the rows, and lengths of what the codes leave of them."""
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    out, figures = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), 3)
    addresses = x.data_ptr(), out.data_ptr(), figures.data_ptr()
    _run("bounded_codes", x.shape[1], CodeArguments, *addresses, x.shape[1], rows=len(x))
    return out, figures


def _plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    flat = weight.shape == x.shape[-1:] and weight.is_contiguous()
    return flat and x.dtype == weight.dtype == torch.float32


def _run(
    name: str, whole: int, kind: type[ctypes.Structure], *values: float, rows: int, width: int | None = None
) -> None:
    """Run a function of `rows_llvm` whose vectors divide `whole`, over rows of `width` numbers."""
    code = rows_llvm.compiled(math.gcd(whole, host_lanes()))
    threads = torch.get_num_threads() if rows * (width or whole) > _ALONE else 1
    arguments = kind(*values, rows, max(1, rows // (4 * threads)) if threads > 1 else max(1, rows), 0)
    (team.run if threads > 1 else team.alone)(code.functions[name], arguments)
