"""What one step of a product is: how weights lie, what is broadcast of a row, and how both are added to a sum.

Knows nothing of tiles (`tiles_llvm`) and threads (`product_llvm`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llvmlite import ir

from dspark.kernels.parts_llvm import FLOAT, INT32, Writer, number

__all__ = ["Bfloat16", "BoundedCodes", "Codes", "Dots", "Float32", "Form"]


class Form(Protocol):
    """A step takes `inputs` inputs: `vectors` vectors `stored` of a panel, and one `element` of each row.

    `behind`: vectors at the end of a panel that are no step's. `figures`: float32s of a row beside its elements.
    `peaked`: the greatest of a panel's outputs is kept beside them. `alone`: the first tile is of one panel, however
    few rows it has.
    """

    name: str
    peaked: bool
    alone: bool
    inputs: int
    vectors: int
    behind: int
    figures: int
    stored: ir.VectorType
    element: ir.Type

    def rows(self, write: Writer, x: ir.Value, count: ir.Value, room: ir.Value) -> ir.Value:
        """Elements of rows of `count` numbers in all at `x`; both are addresses, `room` of a thread's, as large."""

    def start(self, write: Writer, behind: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Sums of both halves of a panel's outputs before the first step, given where its steps end."""

    def tables(self, write: Writer, behind: ir.Value) -> Sequence[ir.Value]:
        """What all steps of a weight need to be read, given where the steps of some panel end."""

    def load(self, write: Writer, at: ir.Value, tables: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:
        """A step's weights of outputs 0 to lanes - 1 of a panel, and of the others."""

    def add(self, write: Writer, one: ir.Value, half: ir.Value, total: ir.Value) -> ir.Value:
        """The sums, with this step."""

    def end(self, write: Writer, totals: Sequence[ir.Value], behind: ir.Value, scale: ir.Value) -> list[ir.Value]:
        """Outputs in float32 of both halves; `scale` is where the row's figures lie."""


class _Summed:
    """Sums in float32, from nothing to the outputs."""

    behind = 0
    figures = 1
    peaked = False

    def start(self, write: Writer, behind: ir.Value) -> tuple[ir.Value, ir.Value]:  # noqa: ARG002 - other forms need it
        """Nothing yet."""
        return write.zero, write.zero

    def end(self, write: Writer, totals: Sequence[ir.Value], behind: ir.Value, scale: ir.Value) -> list[ir.Value]:  # noqa: ARG002
        """As they are."""
        return list(totals)


class _Plain:
    """Weights that lie as they are added."""

    alone = False

    def tables(self, write: Writer, behind: ir.Value) -> Sequence[ir.Value]:  # noqa: ARG002 - `Short` needs it
        """None."""
        return ()


class _Beside(_Plain):
    """A step has a vector of outputs n to n + lanes of a panel, then one of the other half."""

    vectors = 2
    stored: ir.VectorType

    def load(self, write: Writer, at: ir.Value, tables: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:  # noqa: ARG002
        """Both halves of the panel's outputs."""
        return write.load(at, self.stored), write.load(write.at(at, number(1)), self.stored)


class _AsTheyAre(_Summed):
    """Rows of float32, multiplied and added with one rounding."""

    inputs = 1
    element = FLOAT

    def rows(self, write: Writer, x: ir.Value, count: ir.Value, room: ir.Value) -> ir.Value:  # noqa: ARG002 - see `Dots`
        """As they lie."""
        return write.floats(x)

    def add(self, write: Writer, one: ir.Value, half: ir.Value, total: ir.Value) -> ir.Value:
        """A fused multiply-add."""
        return write.fma(one, half, total)


class Bfloat16(_Plain, _AsTheyAre):
    """Outputs n and n + lanes of a panel in the lower and upper half of 32 bits, widened by a shift and by a mask."""

    name = "bfloat16"
    vectors = 1

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(INT32, lanes)

    def load(self, write: Writer, at: ir.Value, tables: Sequence[ir.Value]) -> tuple[ir.Value, ir.Value]:  # noqa: ARG002
        """Both halves of the panel's outputs, widened."""
        pair = write.load(at, self.stored)
        low = write.build.shl(pair, ir.Constant(self.stored, [16] * self.stored.count))
        high = write.build.and_(pair, ir.Constant(self.stored, [0xFFFF0000] * self.stored.count))
        return write.build.bitcast(low, write.vector), write.build.bitcast(high, write.vector)


class Float32(_Beside, _AsTheyAre):
    """Weights as rows are."""

    name = "float32"

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(FLOAT, lanes)


class Dots(_Beside, _Summed):
    """Two inputs a step, in bfloat16 (AVX512-BF16).

    Each thread rounds all rows to bfloat16 for itself, once. One panel after another comes sooner from memory than
    several side by side.
    """

    name = "dots"
    alone = True
    inputs = 2
    element = INT32

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(INT32, lanes)

    def rows(self, write: Writer, x: ir.Value, count: ir.Value, room: ir.Value) -> ir.Value:
        """Rounded to the nearest, to even in the middle."""
        lanes, x = write.lanes, write.floats(x)
        elements = write.build.inttoptr(room, INT32.as_pointer())
        halves = ir.VectorType(ir.IntType(16), lanes)
        with write.counting(number(0), count, lanes) as at:
            narrow = write.call("x86.avx512bf16.cvtneps2bf16.512", halves, write.load(write.at(x, at)))
            write.store(narrow, write.at(elements, write.build.sdiv(at, number(self.inputs))))
        return elements

    def add(self, write: Writer, one: ir.Value, half: ir.Value, total: ir.Value) -> ir.Value:
        """Both products are added to the sum."""
        return write.call("x86.avx512bf16.dpbf16ps.512", write.vector, total, one, half)


class Codes(_Beside):
    """Four inputs a step, as signed bytes, over rows in unsigned bytes around 128; sums are int32 (AVX512-VNNI).

    Behind a panel's steps lie, for each half of its outputs, what 128 times the weights take from a sum, then the
    weights' scales.
    """

    name = "codes"
    alone = True
    inputs = 4
    behind = 4
    figures = 1
    peaked = False
    element = INT32

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(INT32, lanes)

    def rows(self, write: Writer, x: ir.Value, count: ir.Value, room: ir.Value) -> ir.Value:  # noqa: ARG002 - see `Dots`
        """As they lie: rows come as codes."""
        return write.build.inttoptr(x, INT32.as_pointer())

    def start(self, write: Writer, behind: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Minus 128 times the weights' sums, so that codes count from 0."""
        return self.load(write, behind, ())

    def add(self, write: Writer, one: ir.Value, half: ir.Value, total: ir.Value) -> ir.Value:
        """Four products are added to the sum."""
        return write.call("x86.avx512.vpdpbusd.512", self.stored, total, one, half)

    def end(self, write: Writer, totals: Sequence[ir.Value], behind: ir.Value, scale: ir.Value) -> list[ir.Value]:
        """Times the row's scale and the weights'."""
        build, row = write.build, write.broadcast(write.build.load(scale))
        return [
            build.fmul(
                build.sitofp(total, write.vector), build.fmul(row, write.load(write.at(behind, number(2 + half))))
            )
            for half, total in enumerate(totals)
        ]


class BoundedCodes(Codes):
    """As `Codes`, and no output is less than the product that the codes stand for (`dspark.kernels.screen`).

    Behind a panel's scales lie its weights' errors and lengths; a row has, behind its scale, its length and its error.
    """

    name = "bounded_codes"
    behind = 8
    figures = 3
    peaked = True

    def end(self, write: Writer, totals: Sequence[ir.Value], behind: ir.Value, scale: ir.Value) -> list[ir.Value]:
        """With what codes may hide on top."""
        length, error = (write.broadcast(write.build.load(write.at(scale, number(place)))) for place in (1, 2))
        outputs = []
        for half, product in enumerate(super().end(write, totals, behind, scale)):
            errors, lengths = (write.load(write.at(behind, number(place + half))) for place in (4, 6))
            outputs.append(write.build.fadd(product, write.fma(errors, length, write.build.fmul(lengths, error))))
        return outputs
