"""The processed distribution of a row of logits without filters, as code for the processor at hand.

The same law as `dspark.sampling.processed`: the greatest tokens exactly, in float64, all others in float32 with a sum
for each block. What is compared are integers in the order of the logits, so that the head is found by counting and
nothing is sorted: first blocks whose greatest number is among the best, then tokens inside them. Measuring a row
reads it twice.

Knows one row. Whom it judges is `judge_llvm`'s affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from dspark.kernels.logits import BLOCK
from dspark.kernels.parts_llvm import DOUBLE, FLOAT, INT, INT32, Writer, number
from services.verifier.kernels.numbers_llvm import (
    Element,
    Weighing,
    end_keys,
    finite,
    function,
    log_weight,
    nth,
    ordered,
    unordered,
)

__all__ = ["FIGURES", "Law", "Room", "Row", "declare"]

_GREATEST, _HEAD, _REST, _EDGE, _LAST = range(5)  # places of a room's figures
FIGURES = 5


@dataclass(frozen=True, slots=True)
class Room:
    """Where a thread keeps a row's law.

    `figures` (FIGURES,), `sums` (blocks,), `weights` (head,) and `inner` (BLOCK,) float64; `peaks` (blocks,), `ids` and
    `keys` (width,) int32, each with room for a vector more.
    """

    figures: ir.Value
    sums: ir.Value
    weights: ir.Value
    inner: ir.Value
    peaks: ir.Value
    ids: ir.Value
    keys: ir.Value

    kinds = (*[DOUBLE.as_pointer()] * 4, *[INT32.as_pointer()] * 3)

    def pointers(self) -> tuple[ir.Value, ...]:
        """In the order of the fields."""
        return self.figures, self.sums, self.weights, self.inner, self.peaks, self.ids, self.keys


@dataclass(frozen=True, slots=True)
class Law:
    """The functions of a module."""

    peaks: ir.Function
    measure: ir.Function
    fill: ir.Function


def declare(module: ir.Module, lanes: int, element: Element) -> Law:
    """Write them.

    `peaks(x, blocks, room…)` gives a row's greatest number, and NaN where one is; `measure(x, blocks, most,
    temperature, room…)` its law, and how many tokens the head has, 0 for a row that is not sound; `fill(x, block,
    temperature, room…)` the weights of a block's tokens outside the head, in `inner`.
    """
    count = nth(module, lanes)
    row = element.stored.as_pointer()
    peaks = function(module, f"peaks_{element.name}", FLOAT, [row, INT, *Room.kinds])
    measure = function(module, f"measure_{element.name}", INT, [row, INT, INT, DOUBLE, *Room.kinds])
    fill = function(module, f"fill_{element.name}", ir.VoidType(), [row, INT, DOUBLE, *Room.kinds])
    _write_peaks(Writer(peaks, lanes), element)
    _Measuring(Writer(measure, lanes), element, peaks, count).write()
    _write_fill(Writer(fill, lanes), element)
    return Law(peaks, measure, fill)


class Row:
    """A row whose law is in a room: figures, and weights of single tokens."""

    def __init__(self, write: Writer, element: Element, x: ir.Value, temperature: ir.Value, room: Room) -> None:
        self._write, self._build = write, write.build
        self._element, self.x, self._temperature, self._room = element, x, temperature, room

    @property
    def greatest(self) -> ir.Value:
        """The greatest logit, float64."""
        return self._figure(_GREATEST)

    @property
    def head(self) -> ir.Value:
        """Weight of the head."""
        return self._figure(_HEAD)

    @property
    def rest(self) -> ir.Value:
        """Weight of all others."""
        return self._figure(_REST)

    @property
    def total(self) -> ir.Value:
        """What a weight is divided by to be a probability."""
        return self._build.fadd(self.head, self.rest)

    def weight(self, token: ir.Value) -> ir.Value:
        """A token's weight, float64: exactly what it counts for in head or rest."""
        write, build = self._write, self._build
        value = self._element.one(write, write.at(self.x, token))
        exact = write.double("exp", log_weight(build, value, self.greatest, self._temperature))
        vector = self.weighing().of(write.broadcast(value))
        rough = build.fpext(build.extract_element(vector, ir.Constant(INT32, 0)), DOUBLE)
        edge, last = self.edge()
        above = build.fcmp_ordered(">", value, edge)
        equal = build.and_(build.fcmp_ordered("==", value, edge), build.icmp_signed("<=", token, last))
        return build.select(build.or_(above, equal), exact, rough)

    def weighing(self) -> Weighing:
        """Float32 weights at its temperature."""
        return Weighing(self._write, self.greatest, self._temperature)

    def edge(self) -> tuple[ir.Value, ir.Value]:
        """The least logit of the head, float32, and the last token that is in it for being equal, int64."""
        build = self._build
        return build.fptrunc(self._figure(_EDGE), FLOAT), build.fptosi(self._figure(_LAST), INT)

    def _figure(self, index: int) -> ir.Value:
        return self._build.load(self._write.at(self._room.figures, number(index)))


class _Outside:
    """Float32 weights of tokens, 0 for those of the head."""

    def __init__(self, write: Writer, element: Element, row: Row) -> None:
        self._write, self._element, build = write, element, write.build
        self._weighing = row.weighing()
        edge, last = row.edge()
        self._edge, self._last = write.broadcast(edge), write.broadcast(build.trunc(last, INT32))
        self._lanes = ir.Constant(ir.VectorType(INT32, write.lanes), list(range(write.lanes)))

    def of(self, x: ir.Value, place: ir.Value) -> ir.Value:
        """Of a vector of tokens from `place` on."""
        write, build = self._write, self._write.build
        values = self._element.load(write, write.at(x, place))
        ids = build.add(write.broadcast(build.trunc(place, INT32)), self._lanes)
        equal = build.fcmp_ordered("==", values, self._edge)
        equal = build.and_(equal, build.icmp_signed("<=", ids, self._last))
        inside = build.or_(build.fcmp_ordered(">", values, self._edge), equal)
        return build.select(inside, write.zero, self._weighing.of(values))


def _write_peaks(write: Writer, element: Element) -> None:
    x, blocks, *pointers = write.function.args
    build, room = write.build, Room(*pointers)

    def peak(block: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
        start, top = write.times(block, BLOCK), None
        for lane in range(0, BLOCK, write.lanes):
            value = element.load(write, write.at(x, start, number(lane)))
            top = value if top is None else write.maximum(top, value)
        build.store(ordered(write, write.folded(top, write.maximum)), write.at(room.peaks, block))
        return [write.maximum(most[0], top)]

    least = write.constant(float("-inf"))
    most = write.summing(number(0), blocks, [least], peak)
    end_keys(write, room.peaks, blocks)
    build.ret(write.folded(most[0], write.maximum))


def _write_fill(write: Writer, element: Element) -> None:
    x, block, temperature, *pointers = write.function.args
    room = Room(*pointers)
    row = Row(write, element, x, temperature, room)
    outside, start = _Outside(write, element, row), write.times(block, BLOCK)
    for lane in range(0, BLOCK, write.lanes):
        weights = outside.of(x, write.build.add(start, number(lane)))
        for index in range(write.lanes):
            one = write.build.extract_element(weights, ir.Constant(INT32, index))
            write.build.store(write.build.fpext(one, DOUBLE), write.at(room.inner, number(lane + index)))
    write.build.ret_void()


class _Measuring:
    """Writes `measure`."""

    def __init__(self, write: Writer, element: Element, peaks: ir.Function, nth: ir.Function) -> None:
        self._write, self._build, self._element = write, write.build, element
        self._peaks, self._nth = peaks, nth
        self._x, self._blocks, self._most, self._temperature, *pointers = write.function.args
        self._room = Room(*pointers)
        self._found, self._equal = self._build.alloca(INT), self._build.alloca(INT)
        self._head = self._build.alloca(DOUBLE)
        self._last = self._build.alloca(INT)

    def write(self) -> None:
        """The whole function."""
        write, build, room = self._write, self._build, self._room
        greatest = build.call(self._peaks, [self._x, self._blocks, *room.pointers()])
        with build.if_then(build.not_(finite(build, greatest))):
            build.ret(number(0))
        self._note(_GREATEST, build.fpext(greatest, DOUBLE))
        least = build.call(self._nth, [room.peaks, self._blocks, self._most])
        self._collect(least)
        found = build.load(self._found)
        end_keys(write, room.keys, found)
        count = write.least(self._most, write.times(self._blocks, BLOCK))
        edge = build.call(self._nth, [room.keys, found, count])
        self._keep(edge, found, count)
        self._note(_EDGE, build.fpext(unordered(write, edge), DOUBLE))
        self._note(_LAST, build.sitofp(build.load(self._last), DOUBLE))
        self._note(_HEAD, build.load(self._head))
        self._add_up()
        build.ret(count)

    def _note(self, index: int, value: ir.Value) -> None:
        self._build.store(value, self._write.at(self._room.figures, number(index)))

    def _collect(self, least: ir.Value) -> None:
        """Ids and keys of the tokens not below `least`, in order."""
        write, build, room = self._write, self._build, self._room
        build.store(number(0), self._found)
        with write.counting(number(0), self._blocks) as block:
            peak = build.load(write.at(room.peaks, block))
            with build.if_then(build.icmp_signed(">=", peak, least)):
                start = write.times(block, BLOCK)
                with write.counting(start, build.add(start, number(BLOCK))) as token:
                    key = ordered(write, self._element.one(write, write.at(self._x, token)))
                    count = build.load(self._found)
                    build.store(build.trunc(token, INT32), write.at(room.ids, count))  # overwritten unless it counts
                    build.store(key, write.at(room.keys, count))
                    more = build.zext(build.icmp_signed(">=", key, least), INT)
                    build.store(build.add(count, more), self._found)

    def _keep(self, edge: ir.Value, found: ir.Value, count: ir.Value) -> None:
        """The head: tokens above the edge, and the first of those on it, with their log weights."""
        write, build, room = self._write, self._build, self._room

        def above(place: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            greater = build.icmp_signed(">", build.load(write.at(room.keys, place)), edge)
            return [build.add(total[0], build.zext(greater, INT))]

        build.store(build.sub(count, write.summing(number(0), found, [number(0)], above)[0]), self._equal)
        build.store(number(0), self._found)
        build.store(number(-1), self._last)
        build.store(ir.Constant(DOUBLE, 0.0), self._head)
        with write.counting(number(0), found) as place:
            token, key = (build.load(write.at(listed, place)) for listed in (room.ids, room.keys))
            on = build.icmp_signed("==", key, edge)
            left = build.load(self._equal)
            taken = build.and_(on, build.icmp_signed(">", left, number(0)))
            with build.if_then(taken):
                build.store(build.sub(left, number(1)), self._equal)
                build.store(build.sext(token, INT), self._last)
            with build.if_then(build.or_(taken, build.icmp_signed(">", key, edge))):
                self._take(token, key)

    def _take(self, token: ir.Value, key: ir.Value) -> None:
        write, build, room = self._write, self._build, self._room
        place = build.load(self._found)
        greatest = build.load(write.at(room.figures, number(_GREATEST)))
        weight = log_weight(build, unordered(write, key), greatest, self._temperature)
        build.store(token, write.at(room.ids, place))
        build.store(weight, write.at(room.weights, place))
        build.store(build.fadd(build.load(self._head), write.double("exp", weight)), self._head)
        build.store(build.add(place, number(1)), self._found)

    def _add_up(self) -> None:
        """Weights of all others, by blocks and in all."""
        write, build, room = self._write, self._build, self._room
        outside = _Outside(write, self._element, Row(write, self._element, self._x, self._temperature, room))

        def add(block: ir.Value, running: list[ir.Value]) -> list[ir.Value]:
            start, total = write.times(block, BLOCK), write.zero
            for lane in range(0, BLOCK, write.lanes):
                total = build.fadd(total, outside.of(self._x, build.add(start, number(lane))))
            own = build.fpext(write.folded(total, build.fadd), DOUBLE)
            build.store(own, write.at(room.sums, block))
            return [build.fadd(running[0], own)]

        rest = write.summing(number(0), self._blocks, [ir.Constant(DOUBLE, 0.0)], add)
        self._note(_REST, rest[0])
