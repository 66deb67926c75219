"""Tiles of a product of rows with a weight in panels: all sums of some rows and panels in registers.

A weight (out, in) lies as groups of `GROUP` panels. A panel holds, step by step through the inputs, the weights of
2 · lanes outputs: a vector of them times one broadcast element of a row is added to that row's sums. So every sum runs
through the inputs in order, whatever the shape of the tile around it: a row's bits depend on nothing else in the batch.

Knows registers and the loop over steps. What a step is, `forms_llvm` says; which tiles run in which order,
`product_llvm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from dspark.kernels.forms_llvm import Dots, Form
from dspark.kernels.parts_llvm import FLOAT, INT, INT32, Writer, number

__all__ = ["GROUP", "LINE", "NARROW", "WIDE", "Tiles", "Tiling"]

GROUP = 4
"""Panels that lie, and mostly are taken by a thread, together."""
LINE = 64
"""Bytes."""
_AHEAD = 6144
"""Bytes of a panel between what the first tile reads and what it asks for; the others find the panel in a cache."""


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


class Tiles:
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
    for line in range(0, 4 * int(form.stored.count) * form.vectors, LINE):
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
