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
from dspark.kernels.short_llvm import Short

__all__ = ["GROUP", "NARROW", "WIDE", "Product", "ProductArguments", "Tiling", "compiled"]

GROUP = 4
"""Panels that lie, and mostly are taken by a thread, together."""
_HALF = GROUP // 2

_LINE = 64  # bytes
_AHEAD = 6144
"""Bytes of a panel between what the first tile reads and what it asks for; the others find the panel in a cache."""
_FEW = 2
"""Tiles of rows up to which each reads `Short` weights as they lie. Of more the first one makes them plain for all."""


class ProductArguments(ctypes.Structure):
    """What the compiled product reads.

    `x` (rows, inputs) float32, or codes with the rows' `scales` (rows, figures) float32, `weight` in panels, `out`
    (rows, outputs) float32, `peaks` (rows, panels) the greatest of each panel's outputs, where the form has them.
    Threads take `share` at a time of `pieces`, whole groups or, if `halved` is 1, halves of them; `next` is the first
    that nobody has taken: 0 at the start. So is `next_room`: a thread has `piece` bytes at `rooms`, for its rows and,
    where there are more than a tile has, one panel of `Short` weights made plain behind them.
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
    weights; `short4` and `short5`: over the same in fewer bits. `codes` and `bounded_codes`: rows and weights in bytes.
    Of these, inputs are a multiple of the lanes; None where the processor does not multiply so.
    """

    tiling: Tiling
    bfloat16: int
    float32: int
    dots: int | None
    short4: int | None
    short5: int | None
    codes: int | None
    bounded_codes: int | None


@lru_cache(maxsize=4)
def compiled(tiling: Tiling | None = None) -> Product:
    """The products for this processor, or of another tiling; some two seconds, once."""
    tiling = tiling or (WIDE if host_lanes() == WIDE.lanes else NARROW)
    module = ir.Module("product")
    lanes, wide = tiling.lanes, tiling == WIDE
    forms: dict[str, Form] = {"bfloat16": Bfloat16(lanes), "float32": Float32(lanes)}
    if wide and host_has("avx512bf16"):
        forms |= {"dots": Dots(lanes), "short4": Short(lanes, five=False), "short5": Short(lanes, five=True)}
    if wide and host_has("avx512vnni"):
        forms |= {"codes": Codes(lanes), "bounded_codes": BoundedCodes(lanes)}
    tiles = {name: _Tiles(module, tiling, form) for name, form in forms.items()}
    plain = {"short4": "dots", "short5": "dots"}
    names = {name: _write_product(tiles[name], tiles.get(plain.get(name, ""))) for name in forms}
    code = compile_module(module, list(names.values())).functions
    own = {name: code[function] for name, function in names.items()}
    able = ("dots", "short4", "short5", "codes", "bounded_codes")
    return Product(tiling, own["bfloat16"], own["float32"], *(own.get(name) for name in able))


class _Tiles:
    """The tiles of one form, written as they are wanted."""

    def __init__(self, module: ir.Module, tiling: Tiling, form: Form) -> None:
        self.module, self.tiling, self.form = module, tiling, form
        self.outputs = 2 * tiling.lanes  # of a panel
        self.most = len(tiling.panels)
        self._written: dict[tuple[int, int, bool, bool], ir.Function] = {}

    def first(self, rows: int, most: int) -> tuple[int, ir.Function]:
        """At most so many panels at once, and what computes so many rows of them, asking for what comes next."""
        panels = 1 if self.form.alone else min(self.tiling.panels[rows - 1], most)
        return panels, self._tile(rows, panels, asks=True)

    def again(self, rows: int, most: int) -> tuple[int, ir.Function]:
        """The same of further rows, as the panels lie in a cache."""
        panels = min(self.tiling.panels[rows - 1], most)
        return panels, self._tile(rows, panels)

    def widening(self) -> ir.Function:
        """The first of as many rows as there can be, which leaves its weights in a room as `Dots` reads them."""
        return self._tile(self.most, 1, asks=True, widens=True)

    def panel(self, write: Writer, steps: ir.Value) -> ir.Value:
        """Vectors of one."""
        return write.build.add(write.times(steps, self.form.vectors), number(self.form.behind))

    def _tile(self, rows: int, panels: int, *, asks: bool = False, widens: bool = False) -> ir.Function:
        shape = (rows, panels, asks, widens)
        if shape not in self._written:
            self._written[shape] = _write_tile(
                self.module, self.tiling, self.form, rows, panels, asks=asks, widens=widens
            )
        return self._written[shape]


def _write_product(tiles: _Tiles, plain: _Tiles | None) -> str:
    """A product with its tiles; its name. `plain`: of `Short` weights made plain."""
    form = tiles.form
    write = kernel(tiles.module, f"product_{form.name}", tiles.tiling.lanes)
    fields = write.fields(ProductArguments)
    given = {name: write.build.load(at) for name, at in fields.items()}
    given["steps"] = write.build.sdiv(given["inputs"], number(form.inputs))
    room = write.build.add(given["rooms"], write.build.mul(write.take(fields["next_room"], number(1)), given["piece"]))
    numbers = write.build.mul(given["rows"], given["inputs"])
    given["elements"] = form.rows(write, given["x"], numbers, room)
    behind = write.build.add(room, write.build.add(write.times(numbers, 2), number(_LINE - 1)))
    given["panel_room"] = write.build.and_(behind, number(-_LINE))
    widening = None if plain is None else tiles.widening()
    halved = write.build.icmp_signed("==", given["halved"], number(1))
    with (
        write.taking(fields["next"], given["share"], given["pieces"]) as share,
        write.counting(*share) as piece,
        write.build.if_else(halved) as (half, whole),
    ):
        for branch, size in ((half, _HALF), (whole, GROUP)):
            with branch:
                first = write.times(piece, size)
                if plain is None or widening is None:
                    _Panels(write, tiles, given, first, size).write()
                else:
                    with write.counting(number(0), number(size)) as panel:
                        _Panels(write, tiles, given, write.build.add(first, panel), 1).widen(widening, plain)
    write.build.ret_void()
    name: str = write.function.name
    return name


class _Panels:
    """Writes all rows of some panels' outputs: full tiles, then one of the rows that are left."""

    def __init__(
        self, write: Writer, tiles: _Tiles, given: Mapping[str, ir.Value], first: ir.Value, count: int
    ) -> None:
        """`count` panels from `first` on."""
        self._write, self._build, self._tiles, self._given = write, write.build, tiles, given
        self._first, self._count = first, count
        panel = tiles.panel(write, given["steps"])
        weight = self._build.inttoptr(given["weight"], tiles.form.stored.as_pointer())
        self._weight = write.at(weight, self._build.mul(first, panel))

    def write(self) -> None:
        """From the weights where they lie."""
        self._rows(self._tiles, self._weight, number(0))

    def widen(self, widening: ir.Function, plain: _Tiles) -> None:
        """Of one panel: up to so many rows as it lies. Of more the first tile leaves it in the room for the others."""
        build = self._build
        few = build.icmp_signed("<=", self._given["rows"], number(_FEW * self._tiles.most))
        with build.if_else(few) as (once, many):
            with once:
                self.write()
            with many:
                room = build.inttoptr(self._given["panel_room"], plain.form.stored.as_pointer())
                build.call(widening, [*self._places(self._tiles, self._weight, number(0), 0), room])
                self._rows(plain, room, number(plain.most))

    def _rows(self, tiles: _Tiles, weight: ir.Value, begin: ir.Value) -> None:
        """All rows from `begin` on."""
        write, build, rows = self._write, self._build, self._given["rows"]
        left = build.srem(build.sub(rows, begin), number(tiles.most))
        full = build.sub(rows, left)
        with write.counting(begin, full, tiles.most) as row:
            self._tile(tiles, weight, tiles.most, row)
        write.cases(left, range(1, tiles.most), lambda count: self._tile(tiles, weight, count, full))

    def _tile(self, tiles: _Tiles, weight: ir.Value, rows: int, row: ir.Value) -> None:
        begins = self._build.icmp_signed("==", row, number(0))
        with self._build.if_else(begins) as (first, again):
            for branch, of in ((first, tiles.first), (again, tiles.again)):
                with branch:
                    panels, function = of(rows, self._count)
                    for place in range(0, self._count, panels):
                        self._build.call(function, self._places(tiles, weight, row, place))

    def _places(self, tiles: _Tiles, weight: ir.Value, row: ir.Value, place: int) -> list[ir.Value]:
        """Arguments of the tile from a row on, of the panels from one on."""
        write, build, given, form, width = self._write, self._build, self._given, tiles.form, tiles.outputs
        scales, out, peaks = (write.floats(given[name]) for name in ("scales", "out", "peaks"))
        own = write.at(weight, write.times(tiles.panel(write, given["steps"]), place))
        to = write.at(out, write.times(self._first, width), build.mul(row, given["outputs"]), number(place * width))
        top = write.at(peaks, self._first, build.mul(row, build.sdiv(given["outputs"], number(width))), number(place))
        from_ = write.at(given["elements"], build.mul(row, given["steps"]))
        beside = write.at(scales, write.times(row, form.figures))
        return [from_, own, to, top, beside, given["steps"], given["outputs"]]


def _write_tile(
    module: ir.Module, tiling: Tiling, form: Form, rows: int, panels: int, *, asks: bool, widens: bool
) -> ir.Function:
    """tile(x, weight, out, peaks, scales, steps, outputs): `rows` rows times some panels, all sums in registers.

    One that `asks` does so for weights further on. One that `widens` has a last argument: where it leaves the weights
    of its one panel as it adds them.
    """
    places = (kind.as_pointer() for kind in (form.element, form.stored, FLOAT, FLOAT, FLOAT))
    kind = ir.FunctionType(ir.VoidType(), [*places, INT, INT, *([Dots(tiling.lanes).stored.as_pointer()] * widens)])
    function = ir.Function(module, kind, f"tile_{form.name}_{rows}_{panels}{'_asks' * asks}{'_widens' * widens}")
    function.linkage = "internal"
    x, weight, out, peaks, scales, steps, outputs, *room = function.args
    write = Writer(function, tiling.lanes)
    build = write.build
    x_rows = [write.at(x, write.times(steps, row)) for row in range(rows)]
    size = write.times(steps, form.vectors)
    starts = [write.at(weight, write.times(build.add(size, number(form.behind)), panel)) for panel in range(panels)]
    ends = [write.at(start, size) for start in starts]
    tables = form.tables(write, ends[0])

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        own = [write.at(start, write.times(k, form.vectors)) for start in starts]
        if asks:
            _ask(write, form, own)
        halves = [half for at in own for half in form.load(write, at, tables)]
        for to in room:
            _leave(write, halves, write.at(to, write.times(k, 2)))
        return _added(write, form, [write.at(row, k) for row in x_rows], halves, sums)

    sums = write.summing(number(0), steps, [half for end in ends for half in form.start(write, end)] * rows, add)
    _write_outputs(write, form, sums, ends, (out, peaks, scales, outputs))
    build.ret_void()
    return function


def _ask(write: Writer, form: Form, places: Sequence[ir.Value]) -> None:
    """For what lies behind a step's weights of each panel."""
    for line in range(0, 4 * int(form.stored.count) * form.vectors, _LINE):
        for place in places:
            write.prefetch(place, _AHEAD + line)


def _leave(write: Writer, halves: Sequence[ir.Value], to: ir.Value) -> None:
    for half, value in enumerate(halves):
        write.store(value, write.at(to, number(half)))


def _added(
    write: Writer, form: Form, elements: Sequence[ir.Value], halves: Sequence[ir.Value], sums: Sequence[ir.Value]
) -> list[ir.Value]:
    """Sums row by row, with a step. An element is read where it is used: read before, they take too many registers."""
    added: list[ir.Value] = []
    for at in elements:
        one = write.broadcast(write.build.load(at))
        added += [form.add(write, one, half, sums[len(added) + place]) for place, half in enumerate(halves)]
    return added


def _write_outputs(
    write: Writer,
    form: Form,
    sums: Sequence[ir.Value],
    ends: Sequence[ir.Value],
    given: tuple[ir.Value, ir.Value, ir.Value, ir.Value],
) -> None:
    """From sums row by row, two of each panel, whose steps end at `ends`; `given`: out, peaks, scales and outputs."""
    (out, peaks, scales, outputs), build, left = given, write.build, iter(sums)
    every = build.sdiv(outputs, number(2 * write.lanes))
    tops: list[tuple[ir.Value, ir.Value]] = []
    for row in range(len(sums) // (2 * len(ends))):
        for panel, end in enumerate(ends):
            halves = form.end(write, [next(left), next(left)], end, write.at(scales, number(row * form.figures)))
            for half, value in enumerate(halves, 2 * panel):
                write.store(value, write.at(out, write.times(outputs, row), number(half * write.lanes)))
            if form.peaked:
                tops.append((write.maximum(*halves), write.at(peaks, write.times(every, row), number(panel))))
    for first in range(0, len(tops), write.lanes):
        own = tops[first : first + write.lanes]
        folds = write.folded_together([top for top, _ in own], write.maximum)
        for lane, (_, at) in enumerate(own):
            build.store(build.extract_element(folds, ir.Constant(INT32, lane)), at)
