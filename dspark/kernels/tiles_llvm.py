"""The product of rows with a weight in panels, as code for the processor at hand.

A weight (out, in) lies as groups of `GROUP` panels. A panel holds, input by input, the weights of 2 · lanes outputs: a
vector of them times one broadcast number of a row is added to that row's sums. So every sum runs through the inputs in
order, one fused multiply-add each, whatever the shape of the tile around it: a row's bits depend on nothing else in the
batch. Two bfloat16 weights share 32 bits; widening them is a shift for the one and a mask for the other.

Knows registers and loops. How weights are packed, and what runs this, is `linear_llvm`'s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.parts_llvm import FLOAT, INT, INT32, Writer, compile_module, host_lanes, kernel, number

__all__ = ["GROUP", "NARROW", "WIDE", "Product", "ProductArguments", "Tiling", "compiled"]

GROUP = 4
"""Panels that a thread takes together."""

_LINE = 64  # bytes
_AHEAD = 4096
"""Bytes of a panel between what the first tile reads and what it asks for; the others find the panel in a cache."""


class ProductArguments(ctypes.Structure):
    """What the compiled product reads.

    `x` (rows, inputs) float32, `weight` in panels, `out` (rows, outputs) float32, `groups` of panels, `share` groups
    that a thread takes at a time, `next` the first group that nobody has taken: 0 at the start.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("x", "weight", "out", "rows", "inputs", "outputs", "groups", "share", "next")
    ]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Numbers in a vector, and panels at once for a tile of 1, 2, … rows: as many sums as the registers hold."""

    lanes: int
    panels: tuple[int, ...]

    @property
    def group_outputs(self) -> int:
        """Outputs of a group of panels."""
        return GROUP * 2 * self.lanes


WIDE = Tiling(16, (4, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1))  # AVX-512: 32 registers of 16
NARROW = Tiling(8, (4, 2, 1, 1, 1, 1))  # AVX2: 16 registers of 8; Arm: 32 of 4


@dataclass(frozen=True, slots=True)
class Product:
    """The compiled products over bfloat16 and over float32 weights: addresses of what a team runs."""

    tiling: Tiling
    bfloat16: int
    float32: int


@lru_cache(maxsize=4)
def compiled(tiling: Tiling | None = None) -> Product:
    """The products for this processor, or of another tiling; a quarter of a second, once."""
    tiling = tiling or (WIDE if host_lanes() == WIDE.lanes else NARROW)
    module = ir.Module("product")
    narrow, wide = (_write_product(module, tiling, weights(tiling.lanes)) for weights in (_Bfloat16, _Float32))
    code = compile_module(module, [narrow, wide])
    return Product(tiling, code.functions[narrow], code.functions[wide])


class _Bfloat16:
    """Outputs n and n + lanes of a panel in the lower and upper half of 32 bits."""

    name = "bfloat16"
    vectors = 1  # that a panel has for an input

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(INT32, lanes)

    def load(self, write: Writer, at: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both halves of the panel's outputs, widened."""
        pair = write.load(at, self.stored)
        low = write.build.shl(pair, ir.Constant(self.stored, [16] * self.stored.count))
        high = write.build.and_(pair, ir.Constant(self.stored, [0xFFFF0000] * self.stored.count))
        return write.build.bitcast(low, write.vector), write.build.bitcast(high, write.vector)


class _Float32:
    """Outputs n to n + lanes of a panel, then the other half."""

    name = "float32"
    vectors = 2

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(FLOAT, lanes)

    def load(self, write: Writer, at: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both halves of the panel's outputs."""
        return write.load(at), write.load(write.at(at, number(1)))


_Weights = _Bfloat16 | _Float32


def _write_product(module: ir.Module, tiling: Tiling, weights: _Weights) -> str:
    """A product with its tiles; its name."""
    counts = range(1, len(tiling.panels) + 1)
    tiles = {n: tuple(_write_tile(module, tiling, weights, n, ahead) for ahead in (_AHEAD, 0)) for n in counts}
    write = kernel(module, f"product_{weights.name}", tiling.lanes)
    fields = write.fields(ProductArguments)
    given = {name: write.build.load(at) for name, at in fields.items()}
    with write.taking(fields["next"], given["share"], given["groups"]) as (first, end), write.counting(first, end) as g:
        _write_group(write, tiling, weights, tiles, given, g)
    write.build.ret_void()
    name: str = write.function.name
    return name


def _write_group(
    write: Writer,
    tiling: Tiling,
    weights: _Weights,
    tiles: Mapping[int, Sequence[ir.Function]],
    given: Mapping[str, ir.Value],
    group: ir.Value,
) -> None:
    """All rows of one group's outputs: full tiles, then one of the rows that are left."""
    build, inputs, outputs = write.build, given["inputs"], given["outputs"]
    panel = write.times(inputs, weights.vectors)
    weight = build.inttoptr(given["weight"], weights.stored.as_pointer())
    weight = write.at(weight, build.mul(group, write.times(panel, GROUP)))
    x, out = (write.floats(given[name]) for name in ("x", "out"))
    out = write.at(out, write.times(group, tiling.group_outputs))

    def tile(rows: int, row: ir.Value) -> None:
        from_, to = write.at(x, build.mul(row, inputs)), write.at(out, build.mul(row, outputs))
        function = build.select(build.icmp_signed("==", row, number(0)), *tiles[rows])
        for first in range(0, GROUP, tiling.panels[rows - 1]):
            at = write.at(weight, write.times(panel, first)), write.at(to, number(first * 2 * tiling.lanes))
            build.call(function, [from_, *at, inputs, outputs])

    most = len(tiling.panels)
    left = build.srem(given["rows"], number(most))
    full = build.sub(given["rows"], left)
    with write.counting(number(0), full, most) as row:
        tile(most, row)
    write.cases(left, range(1, most), lambda rows: tile(rows, full))


def _write_tile(module: ir.Module, tiling: Tiling, weights: _Weights, rows: int, ahead: int) -> ir.Function:
    """tile(x, weight, out, inputs, outputs): `rows` rows times some panels, all sums in registers.

    Weights `ahead` bytes further on are asked for, unless that is 0.
    """
    panels, at = tiling.panels[rows - 1], FLOAT.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [at, weights.stored.as_pointer(), at, INT, INT])
    function = ir.Function(module, kind, f"tile_{weights.name}_{rows}_{ahead}")
    function.linkage = "internal"
    x, weight, out, inputs, outputs = function.args
    write = Writer(function, tiling.lanes)
    build = write.build
    x_rows = [write.at(x, write.times(inputs, row)) for row in range(rows)]
    starts = [write.at(weight, write.times(inputs, weights.vectors * panel)) for panel in range(panels)]

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        index = write.times(k, weights.vectors)
        for line in range(0, weights.vectors * 4 * tiling.lanes, _LINE) if ahead else ():
            for start in starts:
                write.prefetch(write.at(start, index), ahead + line)
        halves = [half for start in starts for half in weights.load(write, write.at(start, index))]
        numbers = [write.broadcast(build.load(write.at(row, k))) for row in x_rows]
        pairs = ((one, half) for one in numbers for half in halves)
        return [write.fma(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

    sums = write.summing(number(0), inputs, [write.zero] * (rows * panels * 2), add)
    for index, total in enumerate(sums):
        row, half = divmod(index, panels * 2)
        write.store(total, write.at(out, write.times(outputs, row), number(half * tiling.lanes)))
    build.ret_void()
    return function
