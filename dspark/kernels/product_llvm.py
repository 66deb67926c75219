"""The product of rows with a weight in panels, as code for the processor at hand.

Knows which threads take which panels, and which tiles of rows run in which order. How a tile computes, `tiles_llvm`
says; how weights are packed, and what runs this, `linear_llvm`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.forms_llvm import Bfloat16, BoundedCodes, Codes, Dots, Float32, Form
from dspark.kernels.parts_llvm import Writer, compile_module, host_has, host_lanes, kernel, number
from dspark.kernels.short_llvm import Short
from dspark.kernels.tiles_llvm import GROUP, LINE, NARROW, WIDE, Tiles, Tiling

__all__ = ["FEW_ROWS", "Product", "ProductArguments", "compiled", "plain_bytes"]

_HALF = GROUP // 2
_FEW = 2
"""Tiles of rows up to which each reads `Short` weights as they lie. Of more the first one makes them plain for all."""
FEW_ROWS = _FEW * len(WIDE.panels)
"""Up to which a room has rows only."""


class ProductArguments(ctypes.Structure):
    """What the compiled product reads.

    `x` (rows, inputs) float32, or codes with the rows' `scales` (rows, figures) float32, `weight` in panels, `out`
    (rows, outputs) float32, `peaks` (rows, panels) the greatest of each panel's outputs, where the form has them.
    Threads take `share` at a time of `pieces`, whole groups or, if `halved` is 1, halves of them; `next` is the first
    that nobody has taken: 0 at the start. So is `next_room`: a thread has `piece` bytes at `rooms`, for its rows and,
    where there are more than `FEW_ROWS`, one panel of `Short` weights made plain behind them.
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


def plain_bytes(inputs: int) -> int:
    """Of a room, what one panel of `Short` weights made plain takes behind the rows."""
    return 4 * WIDE.lanes * inputs + LINE


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
    tiles = {name: Tiles(module, tiling, form) for name, form in forms.items()}
    plain = {"short4": "dots", "short5": "dots"}
    names = {name: _write_product(tiles[name], tiles.get(plain.get(name, ""))) for name in forms}
    code = compile_module(module, list(names.values())).functions
    own = {name: code[function] for name, function in names.items()}
    able = ("dots", "short4", "short5", "codes", "bounded_codes")
    return Product(tiling, own["bfloat16"], own["float32"], *(own.get(name) for name in able))


def _write_product(tiles: Tiles, plain: Tiles | None) -> str:
    """A product with its tiles; its name. `plain`: of `Short` weights made plain."""
    form = tiles.form
    write = kernel(tiles.module, f"product_{form.name}", tiles.tiling.lanes)
    fields = write.fields(ProductArguments)
    given = {name: write.build.load(at) for name, at in fields.items()}
    given["steps"] = write.build.sdiv(given["inputs"], number(form.inputs))
    room = write.build.add(given["rooms"], write.build.mul(write.take(fields["next_room"], number(1)), given["piece"]))
    numbers = write.build.mul(given["rows"], given["inputs"])
    given["elements"] = form.rows(write, given["x"], numbers, room)
    behind = write.build.add(room, write.build.add(write.times(numbers, 2), number(LINE - 1)))
    given["panel_room"] = write.build.and_(behind, number(-LINE))
    halved = write.build.icmp_signed("==", given["halved"], number(1))
    with (
        write.taking(fields["next"], given["share"], given["pieces"]) as share,
        write.counting(*share) as piece,
        write.build.if_else(halved) as (half, whole),
    ):
        for branch, size in ((half, _HALF), (whole, GROUP)):
            with branch:
                first = write.times(piece, size)
                if plain is None:
                    _Panels(write, tiles, given, first, size).write()
                    continue
                with write.counting(number(0), number(size)) as panel:
                    _Panels(write, tiles, given, write.build.add(first, panel), 1).write_widened(plain)
    write.build.ret_void()
    name: str = write.function.name
    return name


class _Panels:
    """Writes all rows of some panels' outputs: full tiles, then one of the rows that are left."""

    def __init__(self, write: Writer, tiles: Tiles, given: Mapping[str, ir.Value], first: ir.Value, count: int) -> None:
        """`count` panels from `first` on."""
        self._write, self._build, self._tiles, self._given = write, write.build, tiles, given
        self._first, self._count = first, count
        panel = tiles.panel(write, given["steps"])
        weight = self._build.inttoptr(given["weight"], tiles.form.stored.as_pointer())
        self._weight = write.at(weight, self._build.mul(first, panel))

    def write(self) -> None:
        """From the weights where they lie."""
        self._rows(self._tiles, self._weight, number(0))

    def write_widened(self, plain: Tiles) -> None:
        """Of one panel: up to so many rows as it lies. Of more the first tile leaves it in the room for the others."""
        build = self._build
        few = build.icmp_signed("<=", self._given["rows"], number(FEW_ROWS))
        with build.if_else(few) as (once, many):
            with once:
                self.write()
            with many:
                room = build.inttoptr(self._given["panel_room"], plain.form.stored.as_pointer())
                build.call(self._tiles.widening(), [*self._places(self._tiles, self._weight, number(0), 0), room])
                self._rows(plain, room, number(plain.most))

    def _rows(self, tiles: Tiles, weight: ir.Value, begin: ir.Value) -> None:
        """All rows from `begin` on."""
        write, build, rows = self._write, self._build, self._given["rows"]
        left = build.srem(build.sub(rows, begin), number(tiles.most))
        full = build.sub(rows, left)
        with write.counting(begin, full, tiles.most) as row:
            self._tile(tiles, weight, tiles.most, row)
        write.cases(left, range(1, tiles.most), lambda count: self._tile(tiles, weight, count, full))

    def _tile(self, tiles: Tiles, weight: ir.Value, rows: int, row: ir.Value) -> None:
        begins = self._build.icmp_signed("==", row, number(0))
        with self._build.if_else(begins) as (first, again):
            for branch, of in ((first, tiles.first), (again, tiles.again)):
                with branch:
                    panels, function = of(rows, self._count)
                    for place in range(0, self._count, panels):
                        self._build.call(function, self._places(tiles, weight, row, place))

    def _places(self, tiles: Tiles, weight: ir.Value, row: ir.Value, place: int) -> list[ir.Value]:
        """Arguments of the tile from a row on, of the panels from one on."""
        write, build, given, form, width = self._write, self._build, self._given, tiles.form, tiles.outputs
        scales, out, peaks = (write.floats(given[name]) for name in ("scales", "out", "peaks"))
        own = write.at(weight, write.times(tiles.panel(write, given["steps"]), place))
        to = write.at(out, write.times(self._first, width), build.mul(row, given["outputs"]), number(place * width))
        top = write.at(peaks, self._first, build.mul(row, build.sdiv(given["outputs"], number(width))), number(place))
        from_ = write.at(given["elements"], build.mul(row, given["steps"]))
        beside = write.at(scales, write.times(row, form.figures))
        return [from_, own, to, top, beside, given["steps"], given["outputs"]]
