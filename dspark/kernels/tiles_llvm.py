"""The product of rows with a weight in panels, as code for the processor at hand.

A weight (out, in) lies as groups of `GROUP` panels. A panel holds, step by step through the inputs, the weights of
2 · lanes outputs: a vector of them times one broadcast element of a row is added to that row's sums. So every sum runs
through the inputs in order, whatever the shape of the tile around it: a row's bits depend on nothing else in the batch.

Knows registers and loops. What a step is, `forms_llvm` says; how weights are packed, and what runs this, `linear_llvm`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.forms_llvm import Bfloat16, BoundedCodes, Codes, Dots, Float32, Form
from dspark.kernels.parts_llvm import FLOAT, INT, INT32, Writer, compile_module, host_has, host_lanes, kernel, number

__all__ = ["GROUP", "NARROW", "WIDE", "Product", "ProductArguments", "Tiling", "compiled"]

GROUP = 4
"""Panels that lie, and mostly are taken by a thread, together."""
_HALF = GROUP // 2

_LINE = 64  # bytes
_AHEAD = 6144
"""Bytes of a panel between what the first tile reads and what it asks for; the others find the panel in a cache."""


class ProductArguments(ctypes.Structure):
    """What the compiled product reads.

    `x` (rows, inputs) float32, or codes with the rows' `scales` (rows, figures) float32, `weight` in panels, `out`
    (rows, outputs) float32, `peaks` (rows, panels) the greatest of each panel's outputs, where the form has them.
    Threads take `share` at a time of `pieces`, whole groups or, if `halved` is 1, halves of them; `next` is the first
    that nobody has taken: 0 at the start. So is `next_room`: a thread has `piece` bytes at `rooms`.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "x",
            "scales",
            "weight",
            "out",
            "peaks",
            "rows",
            "inputs",
            "outputs",
            "pieces",
            "halved",
            "share",
            "rooms",
            "piece",
            "next_room",
            "next",
        )
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
    """The compiled products: addresses of what a team runs.

    `bfloat16` and `float32`: rows as they are, over weights kept so. `dots`: rows rounded to bfloat16 over bfloat16
    weights. `codes` and `bounded_codes`: rows and weights in bytes. Of these, inputs are a multiple of the lanes; None
    where the processor does not multiply so.
    """

    tiling: Tiling
    bfloat16: int
    float32: int
    dots: int | None
    codes: int | None
    bounded_codes: int | None


@lru_cache(maxsize=4)
def compiled(tiling: Tiling | None = None) -> Product:
    """The products for this processor, or of another tiling; a quarter of a second, once."""
    tiling = tiling or (WIDE if host_lanes() == WIDE.lanes else NARROW)
    module = ir.Module("product")
    lanes, wide = tiling.lanes, tiling == WIDE
    forms: dict[str, Form] = {"bfloat16": Bfloat16(lanes), "float32": Float32(lanes)}
    if wide and host_has("avx512bf16"):
        forms["dots"] = Dots(lanes)
    if wide and host_has("avx512vnni"):
        forms |= {"codes": Codes(lanes), "bounded_codes": BoundedCodes(lanes)}
    names = {name: _write_product(module, tiling, form) for name, form in forms.items()}
    code = compile_module(module, list(names.values())).functions
    own = {name: code[function] for name, function in names.items()}
    return Product(
        tiling, own["bfloat16"], own["float32"], *(own.get(name) for name in ("dots", "codes", "bounded_codes"))
    )


def _write_product(module: ir.Module, tiling: Tiling, form: Form) -> str:
    """A product with its tiles; its name."""
    most = {GROUP: tiling.panels, _HALF: tuple(min(panels, _HALF) for panels in tiling.panels)}
    shapes = sorted({(rows, panels) for of in most.values() for rows, panels in enumerate(of, 1)})
    tiles = {
        shape: tuple(_write_tile(module, tiling, form, *shape, ahead) for ahead in (_AHEAD, 0)) for shape in shapes
    }
    write = kernel(module, f"product_{form.name}", tiling.lanes)
    fields = write.fields(ProductArguments)
    given = {name: write.build.load(at) for name, at in fields.items()}
    given["steps"] = write.build.sdiv(given["inputs"], number(form.inputs))
    room = write.build.add(given["rooms"], write.build.mul(write.take(fields["next_room"], number(1)), given["piece"]))
    numbers = write.build.mul(given["rows"], given["inputs"])
    given["elements"] = form.rows(write, given["x"], numbers, room)
    halved = write.build.icmp_signed("==", given["halved"], number(1))
    with (
        write.taking(fields["next"], given["share"], given["pieces"]) as share,
        write.counting(*share) as piece,
        write.build.if_else(halved) as (half, whole),
    ):
        for branch, size in ((half, _HALF), (whole, GROUP)):
            own = [tiles[rows, panels] for rows, panels in enumerate(most[size], 1)]
            with branch:
                _Piece(write, tiling, form, size, own, given).write(piece)
    write.build.ret_void()
    name: str = write.function.name
    return name


class _Piece:
    """Writes all rows of so many panels' outputs: full tiles, then one of the rows that are left."""

    def __init__(
        self,
        write: Writer,
        tiling: Tiling,
        form: Form,
        size: int,
        tiles: Sequence[Sequence[ir.Function]],
        given: Mapping[str, ir.Value],
    ) -> None:
        """`tiles` by rows less one, each with and without asking ahead."""
        self._write, self._build, self._form, self._given = write, write.build, form, given
        self._outputs = 2 * tiling.lanes  # of a panel
        self._size, self._tiles = size, tiles
        self._panels = [min(panels, size) for panels in tiling.panels]

    def write(self, piece: ir.Value) -> None:
        """The piece of that number."""
        write, build, given = self._write, self._build, self._given
        most = len(self._tiles)
        left = build.srem(given["rows"], number(most))
        full = build.sub(given["rows"], left)
        with write.counting(number(0), full, most) as row:
            self._tile(piece, most, row)
        write.cases(left, range(1, most), lambda rows: self._tile(piece, rows, full))

    def _tile(self, piece: ir.Value, rows: int, row: ir.Value) -> None:
        write, build, given, form = self._write, self._build, self._given, self._form
        panel = build.add(write.times(given["steps"], form.vectors), number(form.behind))
        weight = build.inttoptr(given["weight"], form.stored.as_pointer())
        weight = write.at(weight, build.mul(piece, write.times(panel, self._size)))
        scales, out, peaks = (write.floats(given[name]) for name in ("scales", "out", "peaks"))
        to = write.at(out, write.times(piece, self._size * self._outputs), build.mul(row, given["outputs"]))
        panels = build.sdiv(given["outputs"], number(self._outputs))
        top = write.at(peaks, write.times(piece, self._size), build.mul(row, panels))
        from_ = write.at(given["elements"], build.mul(row, given["steps"]))
        function = build.select(build.icmp_signed("==", row, number(0)), *self._tiles[rows - 1])
        for first in range(0, self._size, self._panels[rows - 1]):
            at = write.at(weight, write.times(panel, first)), write.at(to, number(first * self._outputs))
            beside = write.at(top, number(first)), write.at(scales, write.times(row, form.figures))
            build.call(function, [from_, *at, *beside, given["steps"], given["outputs"]])


def _write_tile(module: ir.Module, tiling: Tiling, form: Form, rows: int, panels: int, ahead: int) -> ir.Function:
    """tile(x, weight, out, peaks, scales, steps, outputs): `rows` rows times some panels, all sums in registers.

    Weights `ahead` bytes further on are asked for, unless that is 0.
    """
    places = (kind.as_pointer() for kind in (form.element, form.stored, FLOAT, FLOAT, FLOAT))
    kind = ir.FunctionType(ir.VoidType(), [*places, INT, INT])
    function = ir.Function(module, kind, f"tile_{form.name}_{rows}_{panels}_{ahead}")
    function.linkage = "internal"
    x, weight, out, peaks, scales, steps, outputs = function.args
    write = Writer(function, tiling.lanes)
    build = write.build
    x_rows = [write.at(x, write.times(steps, row)) for row in range(rows)]
    size = write.times(steps, form.vectors)
    starts = [write.at(weight, write.times(build.add(size, number(form.behind)), panel)) for panel in range(panels)]
    ends = [write.at(start, size) for start in starts]

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        index = write.times(k, form.vectors)
        for line in range(0, form.vectors * 4 * tiling.lanes, _LINE) if ahead else ():
            for start in starts:
                write.prefetch(write.at(start, index), ahead + line)
        halves = [half for start in starts for half in form.load(write, write.at(start, index))]
        elements = [write.broadcast(build.load(write.at(row, k))) for row in x_rows]
        pairs = ((one, half) for one in elements for half in halves)
        return [form.add(write, *pair, total) for pair, total in zip(pairs, sums, strict=True)]

    every = build.sdiv(outputs, number(2 * tiling.lanes))
    sums = iter(write.summing(number(0), steps, [half for end in ends for half in form.start(write, end)] * rows, add))
    tops: list[tuple[ir.Value, ir.Value]] = []
    for row in range(rows):
        for panel, end in enumerate(ends):
            halves = form.end(write, [next(sums), next(sums)], end, write.at(scales, number(row * form.figures)))
            for half, value in enumerate(halves, 2 * panel):
                write.store(value, write.at(out, write.times(outputs, row), number(half * tiling.lanes)))
            if form.peaked:
                tops.append((write.maximum(*halves), write.at(peaks, write.times(every, row), number(panel))))
    for first in range(0, len(tops), tiling.lanes):
        own = tops[first : first + tiling.lanes]
        folds = write.folded_together([top for top, _ in own], write.maximum)
        for lane, (_, at) in enumerate(own):
            build.store(build.extract_element(folds, ir.Constant(INT32, lane)), at)
    build.ret_void()
    return function
