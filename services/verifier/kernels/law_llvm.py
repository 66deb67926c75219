"""The processed distribution of a row of logits without filters, as code for the processor at hand.

The same law as `dspark.sampling.processed`: the greatest tokens exactly, in float64, all others in float32 with a sum
for each block. What is compared are integers in the order of the logits, so that the head is found by counting and
nothing is sorted: first blocks whose greatest number is among the best, then tokens inside them. Measuring a row
reads it twice. Where rates will do for weights (`services.verifier.race`) and blocks' greatest numbers are known, all
tokens of a low block have the rate of the greatest, and only high blocks are read.

Knows one row. Whom it judges is `judge_llvm`'s affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from dspark.kernels.logits import BLOCK
from dspark.kernels.parts_llvm import DOUBLE, FLOAT, INT, INT32, Writer, number
from dspark.kernels.screen import PEAKED
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

__all__ = ["FIGURES", "MARKED", "Law", "Room", "Row", "declare"]

_GREATEST, _HEAD, _REST, _EDGE, _LAST, _LOW = range(6)  # places of a room's figures
FIGURES = 6
MARKED = 128
"""Blocks between two running sums that are kept, so that a draw looks at few of a row's sums."""
_LINE = 64  # bytes
_NEVER = (1 << 31) - 1  # in place of a peak: the block is never low


@dataclass(frozen=True, slots=True)
class Room:
    """Where a thread keeps a row's law.

    `figures` (FIGURES,), `weights` (head,), `inner` (BLOCK,) and `marks` (blocks / MARKED + 2,) float64, `sums`
    (blocks,) float64, `peaks` (blocks,), `ids` and `keys` (width,) int32, each of these with room for a vector more.
    """

    figures: ir.Value
    marks: ir.Value
    sums: ir.Value
    weights: ir.Value
    inner: ir.Value
    peaks: ir.Value
    ids: ir.Value
    keys: ir.Value

    kinds = (*[DOUBLE.as_pointer()] * 5, *[INT32.as_pointer()] * 3)

    def pointers(self) -> tuple[ir.Value, ...]:
        """In the order of the fields."""
        return self.figures, self.marks, self.sums, self.weights, self.inner, self.peaks, self.ids, self.keys


@dataclass(frozen=True, slots=True)
class Law:
    """The functions of a module."""

    peaks: ir.Function
    measure: ir.Function
    fill: ir.Function


def declare(module: ir.Module, lanes: int, element: Element) -> Law:
    """Write them.

    `peaks(x, tops, blocks, room…)` gives a row's greatest number, and NaN where one is; those of every `PEAKED` numbers
    are at `tops`, unless that is null. `measure(x, tops, blocks, most, high, temperature, room…)` gives its law, and
    how many tokens the head has, 0 for a row that is not sound; `fill(x, block, temperature, room…)` the weights of a
    block's tokens outside the head, in `inner`. All but the `high` blocks of the greatest peaks, no fewer than the head
    has tokens, and the last one, which may have fewer tokens than others, are low.
    """
    count = nth(module, lanes)
    row = element.stored.as_pointer()
    peaks = function(module, f"peaks_{element.name}", FLOAT, [row, FLOAT.as_pointer(), INT, *Room.kinds])
    sizes = [FLOAT.as_pointer(), INT, INT, INT, DOUBLE]
    measure = function(module, f"measure_{element.name}", INT, [row, *sizes, *Room.kinds])
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
        """A token's weight, float64: exactly what it counts for in head or rest, where no block is low."""
        write, build = self._write, self._build
        value = self._element.one(write, write.at(self.x, token))
        exact = write.double("exp", log_weight(build, value, self.greatest, self._temperature))
        vector = self.weighing().of(write.broadcast(value))
        rough = build.fpext(build.extract_element(vector, ir.Constant(INT32, 0)), DOUBLE)
        edge, last = self.edge()
        above = build.fcmp_ordered(">", value, edge)
        equal = build.and_(build.fcmp_ordered("==", value, edge), build.icmp_signed("<=", token, last))
        return build.select(build.or_(above, equal), exact, rough)

    def low(self, block: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Whether all tokens of a block weigh what its peak would, and that, float32."""
        build = self._build
        peak = build.load(self._write.at(self._room.peaks, block))
        bound = build.fptosi(self._figure(_LOW), INT32)
        return build.icmp_signed("<", peak, bound), unordered(self._write, peak)

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

    def of(self, x: ir.Value, place: ir.Value) -> ir.Value:
        """Of a vector of tokens from `place` on."""
        write, build = self._write, self._write.build
        values = self._element.load(write, write.at(x, place))
        ids = write.numbered(place)
        equal = build.fcmp_ordered("==", values, self._edge)
        equal = build.and_(equal, build.icmp_signed("<=", ids, self._last))
        inside = build.or_(build.fcmp_ordered(">", values, self._edge), equal)
        return build.select(inside, write.zero, self._weighing.of(values))


def _write_peaks(write: Writer, element: Element) -> None:
    x, tops, blocks, *pointers = write.function.args
    build, room = write.build, Room(*pointers)
    given = build.icmp_unsigned("!=", build.ptrtoint(tops, INT), number(0))
    with build.if_then(given):
        build.ret(_taken(write, tops, blocks, room))

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


def _taken(write: Writer, tops: ir.Value, blocks: ir.Value, room: Room) -> ir.Value:
    """The greatest of `tops`, whose keys become the room's peaks."""
    build, lanes, parts = write.build, write.lanes, BLOCK // PEAKED
    assert parts == 2  # of which one has the even places, the other the odd ones

    def peaks(block: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
        at = write.at(tops, write.times(block, parts))
        low, high = write.load(at), write.load(write.at(at, number(lanes)))
        picked = [ir.Constant(ir.VectorType(INT32, lanes), list(range(odd, 2 * lanes, 2))) for odd in range(parts)]
        values = write.maximum(*(build.shuffle_vector(low, high, own) for own in picked))
        write.store(ordered(write, values), write.at(room.peaks, block))
        return [write.maximum(most[0], values)]

    def peak(block: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
        at = write.at(tops, write.times(block, parts))
        values = write.maximum(*(write.broadcast(build.load(write.at(at, number(part)))) for part in range(parts)))
        write.store(ordered(write, values), write.at(room.peaks, block))
        return [write.maximum(most[0], values)]

    whole = build.sub(blocks, build.urem(blocks, number(lanes)))
    most = write.summing(number(0), whole, [write.constant(float("-inf"))], peaks, step=lanes)
    most = write.summing(whole, blocks, most, peak)
    end_keys(write, room.peaks, blocks)
    return write.folded(most[0], write.maximum)


def _write_fill(write: Writer, element: Element) -> None:
    x, block, temperature, *pointers = write.function.args
    room = Room(*pointers)
    row = Row(write, element, x, temperature, room)
    outside, start = _Outside(write, element, row), write.times(block, BLOCK)
    low, peak = row.low(block)
    alike = row.weighing().of(write.broadcast(peak))
    for lane in range(0, BLOCK, write.lanes):
        weights = outside.of(x, write.build.add(start, number(lane)))
        weights = write.build.select(low, alike, weights)
        for index in range(write.lanes):
            one = write.build.extract_element(weights, ir.Constant(INT32, index))
            write.build.store(write.build.fpext(one, DOUBLE), write.at(room.inner, number(lane + index)))
    write.build.ret_void()


class _Measuring:
    """Writes `measure`."""

    def __init__(self, write: Writer, element: Element, peaks: ir.Function, nth: ir.Function) -> None:
        self._write, self._build, self._element = write, write.build, element
        self._peaks, self._nth = peaks, nth
        self._x, self._tops, self._blocks, self._most, self._high, self._temperature, *pointers = write.function.args
        self._room = Room(*pointers)
        self._found, self._equal = self._build.alloca(INT), self._build.alloca(INT)
        self._head = self._build.alloca(DOUBLE)
        self._last = self._build.alloca(INT)

    def write(self) -> None:
        """The whole function."""
        write, build, room = self._write, self._build, self._room
        greatest = build.call(self._peaks, [self._x, self._tops, self._blocks, *room.pointers()])
        with build.if_then(build.not_(finite(build, greatest))):
            build.ret(number(0))
        self._note(_GREATEST, build.fpext(greatest, DOUBLE))
        least = build.call(self._nth, [room.peaks, self._blocks, self._most])
        self._note(_LOW, ir.Constant(DOUBLE, -float(1 << 31)))
        with build.if_then(build.icmp_signed("<", self._high, self._blocks)):
            self._set_low()
            self._presume()
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

    def _set_low(self) -> None:
        """Which blocks are low; the numbers of the others, which lie apart, are asked for."""
        write, build, room = self._write, self._build, self._room
        bound = build.call(self._nth, [room.peaks, self._blocks, self._high])
        self._note(_LOW, build.sitofp(bound, DOUBLE))
        build.store(ir.Constant(INT32, _NEVER), write.at(room.peaks, self._blocks, number(-1)))
        with write.counting(number(0), self._blocks) as block:
            peak = build.load(write.at(room.peaks, block))
            with build.if_then(build.icmp_signed(">=", peak, bound)):
                for line in range(0, 4 * BLOCK, _LINE):
                    write.prefetch(write.at(self._x, write.times(block, BLOCK)), line)

    def _collect(self, least: ir.Value) -> None:
        """Ids and keys of the tokens not below `least`, in order."""
        write, build, room = self._write, self._build, self._room
        build.store(number(0), self._found)
        lowest = write.broadcast(least)
        with write.counting(number(0), self._blocks) as block:
            peak = build.load(write.at(room.peaks, block))
            with build.if_then(build.icmp_signed(">=", peak, least)):
                for lane in range(0, BLOCK, write.lanes):
                    token = build.add(write.times(block, BLOCK), number(lane))
                    keys = ordered(write, self._element.load(write, write.at(self._x, token)))
                    self._append(build.icmp_signed(">=", keys, lowest), write.numbered(token), keys)

    def _append(self, wanted: ir.Value, ids: ir.Value, keys: ir.Value) -> None:
        """To those found, the wanted of a vector."""
        write, build, room, count = self._write, self._build, self._room, self._build.load(self._found)
        more = write.counted(wanted)
        with build.if_then(build.icmp_signed(">", more, number(0))):  # mostly not, and some processors are slow at it
            for values, to in ((ids, room.ids), (keys, room.keys)):
                write.compress(values, wanted, write.at(to, count))
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

    def _presume(self) -> None:
        """Sums of all blocks as if they were low."""
        write, build, room, lanes = self._write, self._build, self._room, self._write.lanes
        weighing = self._row.weighing()
        with write.counting(number(0), self._blocks, lanes) as block:
            peaks = write.load(write.at(room.peaks, block), ir.VectorType(INT32, lanes))
            sums = build.fmul(weighing.of(unordered(write, peaks)), write.constant(float(BLOCK)))
            wide = build.fpext(sums, ir.VectorType(DOUBLE, lanes))
            write.store(wide, write.at(room.sums, block))

    @property
    def _row(self) -> Row:
        return Row(self._write, self._element, self._x, self._temperature, self._room)

    def _add_up(self) -> None:
        """Weights of all others, by blocks and in all."""
        write, build, room = self._write, self._build, self._room
        row = self._row
        outside = _Outside(write, self._element, row)

        def add(block: ir.Value, running: list[ir.Value]) -> list[ir.Value]:
            with build.if_then(build.icmp_signed("==", build.urem(block, number(MARKED)), number(0))):
                build.store(running[0], write.at(room.marks, build.udiv(block, number(MARKED))))
            with build.if_then(build.not_(row.low(block)[0])):
                start, total = write.times(block, BLOCK), write.zero
                for lane in range(0, BLOCK, write.lanes):
                    total = build.fadd(total, outside.of(self._x, build.add(start, number(lane))))
                build.store(build.fpext(write.folded(total, build.fadd), DOUBLE), write.at(room.sums, block))
            return [build.fadd(running[0], build.load(write.at(room.sums, block)))]

        rest = write.summing(number(0), self._blocks, [ir.Constant(DOUBLE, 0.0)], add)
        marks = build.udiv(build.add(self._blocks, number(MARKED - 1)), number(MARKED))
        build.store(rest[0], write.at(room.marks, marks))
        self._note(_REST, rest[0])
