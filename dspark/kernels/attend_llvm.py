"""Attention of rows over paged keys and values, as code for the processor at hand.

A task is a tile, some rows of one sequence in order, and a key/value head: scores of all keys that the rows see, each
row's softmax, the means of the values. Keys and values are read where they lie, once for all rows of a tile and all
query heads of a group. Units of keys begin at multiples of their size, a row's sums run through its keys in order and
through lanes by position: its bits are a function of its position, its keys and its query, whatever tile it is in.

Knows registers and loops. Pages, spans and tiles are `attention_llvm`'s.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.parts_llvm import FLOAT, Writer, compile_module, host_lanes, kernel, number

__all__ = ["KEYS", "LEAST_SCORE", "AttendArguments", "Heads", "Row", "Task", "Writing", "compiled"]

_MOST_HEADS = 4  # that share a vector read
KEYS = 16
"""Keys that lie beside each other in turn; scores begin at multiples of it, so that lanes are those of positions."""
LEAST_SCORE = float("-inf")
"""Of a key that is not seen."""


class AttendArguments(ctypes.Structure):
    """What the compiled attention reads.

    `q` and `out` (rows, kv_heads · group, D) are float32, as is `storage` (2 · kv_heads, pages · page_size, D) unless
    it was compiled for bfloat16; a head of storage has `head_stride` numbers. Row r sees keys `first[r]` … `last[r]`;
    tile t has rows `begin[t]` … `end[t]` - 1, in order of their positions, and its sequence's page numbers begin at
    `pages[tables[t]]`; all of these are 64-bit integers, as is the number of tiles, which lies at `tiles`.
    `rooms` has a piece for each thread, for each row of a tile and head of a group `room` numbers: at least the keys
    that a tile sees and 32 more. `next_room` and `next` are 0 at the start.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("q", "storage", "out", "first", "last")),
        *((name, ctypes.c_int64) for name in ("begin", "end", "tables", "pages")),
        *((name, ctypes.c_int64) for name in ("tiles", "kv_heads", "head_stride")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("rooms", "room", "piece", "next_room", "next")),
    ]


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention is compiled for: query heads of a key/value head, numbers of a head, positions of a page.

    `rounded`: keys and values are bfloat16.
    """

    group: int
    dim: int
    page_size: int
    rounded: bool = False


@lru_cache(maxsize=8)
def compiled(heads: Heads, lanes: int | None = None) -> int:
    """Where the code for a team lies, for this processor or vectors of another length; a tenth of a second, once."""
    module = ir.Module("attend")
    Writing(kernel(module, "attend", math.gcd(heads.dim, lanes or host_lanes())), heads).write()
    return compile_module(module, ["attend"]).functions["attend"]


@dataclass(frozen=True, slots=True)
class Task:
    """One tile and key/value head: its rows, where they see keys, and the page numbers."""

    begin: ir.Value
    end: ir.Value
    head: ir.Value
    keys: ir.Value
    values: ir.Value
    table: ir.Value
    start: ir.Value
    """The first key that has a score."""
    behind: ir.Value
    """Of the tile's last key."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a task: its query heads, what becomes of them, their scores, and the keys it sees."""

    q: ir.Value
    out: ir.Value
    scores: Sequence[ir.Value]
    first: ir.Value
    behind: ir.Value


class Writing:
    """Writes the whole function; sums are float32, one multiply-add after the other."""

    sums = 8
    """In registers: enough to hide a multiply-add's latency, few enough for AVX2's sixteen registers."""

    def __init__(self, write: Writer, heads: Heads) -> None:
        self._write, self._build, self._heads = write, write.build, heads
        self._parts = [range(at, min(at + _MOST_HEADS, heads.group)) for at in range(0, heads.group, _MOST_HEADS)]
        self._beside = math.gcd(KEYS, heads.page_size)
        self._fields = write.fields(AttendArguments)
        given = {name: self._build.load(at) for name, at in self._fields.items()}
        for name in ("q", "out", "rooms"):
            given[name] = write.floats(given[name])
        given["storage"] = (write.halves if heads.rounded else write.floats)(given["storage"])
        for name in ("first", "last", "begin", "end", "tables", "pages"):
            given[name] = write.integers(given[name])
        given["tiles"] = self._build.load(write.integers(given["tiles"]))
        given["scale"] = write.rounded(given["scale"])
        self._given: Mapping[str, ir.Value] = given

    def write(self) -> None:
        """The whole function: rooms for scores, tasks one by one."""
        write, given = self._write, self._given
        mine = write.take(self._fields["next_room"], number(1))
        room = write.at(given["rooms"], self._build.mul(mine, given["piece"]))
        tasks = self._build.mul(given["tiles"], given["kv_heads"])
        with write.taking(self._fields["next"], number(1), tasks) as (index, _):
            task = self._task(index)
            self._scores(task, room)
            self._means(task, room)
        self._build.ret_void()

    def fitting(self, part: range) -> int:
        """Sums of each head of a part that fit beside those of the others: a power of two."""
        return self.sums // (1 << (len(part) - 1).bit_length())

    def _task(self, index: ir.Value) -> Task:
        write, build, given = self._write, self._build, self._given
        tile, head = build.udiv(index, given["kv_heads"]), build.urem(index, given["kv_heads"])
        begin, end, table = (build.load(write.at(given[name], tile)) for name in ("begin", "end", "tables"))
        keys = write.at(given["storage"], build.mul(head, given["head_stride"]))
        values = write.at(keys, build.mul(given["kv_heads"], given["head_stride"]))
        first = build.load(write.at(given["first"], begin))
        last = build.load(write.at(given["last"], build.sub(end, number(1))))
        start = build.sub(first, build.urem(first, number(KEYS)))
        table = write.at(given["pages"], table)
        return Task(begin, end, head, keys, values, table, start, build.add(last, number(1)))

    def _row(self, task: Task, room: ir.Value, row: ir.Value) -> Row:
        write, build, given = self._write, self._build, self._given
        group, dim = self._heads.group, self._heads.dim
        heads = write.times(build.add(build.mul(row, given["kv_heads"]), task.head), group * dim)
        own = build.mul(write.times(build.sub(row, task.begin), group), given["room"])
        scores = [write.at(room, own, write.times(given["room"], head)) for head in range(group)]
        first, last = (build.load(write.at(given[name], row)) for name in ("first", "last"))
        at = write.at(given["q"], heads), write.at(given["out"], heads)
        return Row(*at, scores, first, build.add(last, number(1)))

    def _lying(self, task: Task, rows: ir.Value, position: ir.Value) -> ir.Value:
        """Where a position's key or value lies."""
        size = number(self._heads.page_size)
        page = self._build.load(self._write.at(task.table, self._build.udiv(position, size)))
        slot = self._build.add(self._build.mul(page, size), self._build.urem(position, size))
        return self._write.at(rows, self._write.times(slot, self._heads.dim))

    # ---- scores

    def _scores(self, task: Task, room: ir.Value) -> None:
        """Of every row of a task, scaled, for the keys start … behind - 1."""
        write, build = self._write, self._build
        for part in self._parts:
            unit = math.gcd(self.fitting(part), self._beside)
            with write.counting(task.start, task.behind, unit) as key:
                at, index = self._lying(task, task.keys, key), build.sub(key, task.start)
                self._read_ahead(task, task.keys, key, unit)
                with write.counting(task.begin, task.end) as number_:
                    self._unit(self._row(task, room, number_), part, at, index, unit)

    def _read_ahead(self, task: Task, rows: ir.Value, key: ir.Value, count: int) -> None:
        """Nothing is asked for."""

    def _unit(self, row: Row, part: range, at: ir.Value, index: ir.Value, unit: int) -> None:
        """Scores of `unit` keys from `at` on, which share a page, for the heads of a part."""
        write, build = self._write, self._build

        def add(place: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            keys = [write.load_any(write.at(at, number(n * self._heads.dim), place)) for n in range(unit)]
            queries = [write.load(write.at(row.q, number(head * self._heads.dim), place)) for head in part]
            pairs = ((query, one) for query in queries for one in keys)
            return [write.fma(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

        zeros = [write.zero] * (unit * len(part))
        sums = write.summing(number(0), number(self._heads.dim), zeros, add, step=write.lanes)
        for place, total in enumerate(sums):
            score = build.fmul(write.folded(total, build.fadd), self._given["scale"])
            build.store(score, write.at(row.scores[part[place // unit]], index, number(place % unit)))

    # ---- means

    def _means(self, task: Task, room: ir.Value) -> None:
        """Softmax of every row, then the values' means, some values at a time for all rows."""
        write, build = self._write, self._build
        size = number(self._heads.group * self._heads.dim)
        with write.counting(task.begin, task.end) as number_:
            row = self._row(task, room, number_)
            for scores in row.scores:
                self._softmax(task, row, scores)
            with write.counting(number(0), size, write.lanes) as place:
                write.store(write.zero, write.at(row.out, place))
        first = build.sub(task.start, build.urem(task.start, number(self._beside)))
        with write.counting(first, task.behind, self._beside) as key:
            at = self._lying(task, task.values, key)
            self._read_ahead(task, task.values, key, self._beside)
            with write.counting(task.begin, task.end) as number_:
                self._add_values(task, self._row(task, room, number_), key, at)

    def _softmax(self, task: Task, row: Row, scores: ir.Value) -> None:
        """Scores become weights that add up to one; those of keys that the row does not see are as if -inf."""
        write, build = self._write, self._build
        begin, end = self._hide(task, row, scores)

        def larger(index: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
            return [write.larger(write.load(write.at(scores, index)), most[0])]

        def power(index: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            at = write.at(scores, index)
            below = build.fsub(write.load(at), most)
            broken = build.fcmp_unordered("uno", below, below)  # a score that is no number, or not finite, has to show
            value = build.select(broken, below, write.exp(below))
            write.store(value, at)
            return [build.fadd(total[0], value)]

        found = write.summing(begin, end, [write.constant(LEAST_SCORE)], larger, step=write.lanes)
        most = write.broadcast(write.folded(found[0], write.larger))
        total = write.summing(begin, end, [write.zero], power, step=write.lanes)
        share = write.broadcast(build.fdiv(ir.Constant(FLOAT, 1.0), write.folded(total[0], build.fadd)))
        with write.counting(begin, end, write.lanes) as index:
            at = write.at(scores, index)
            write.store(build.fmul(write.load(at), share), at)

    def _hide(self, task: Task, row: Row, scores: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Where the scores that a row looks at begin and end, whole vectors; of keys it does not see they are -inf."""
        write, build = self._write, self._build
        first, behind = (build.sub(key, task.start) for key in (row.first, row.behind))
        begin = build.sub(first, build.urem(first, number(KEYS)))
        end = build.add(behind, number(write.lanes - 1))
        end = build.sub(end, build.urem(end, number(write.lanes)))
        for hidden in ((begin, first), (behind, end)):
            with write.counting(*hidden) as index:
                build.store(ir.Constant(FLOAT, LEAST_SCORE), write.at(scores, index))
        return begin, end

    def _seen(self, row: Row, key: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Which of the keys beside each other from `key` on a row sees: from which on, and up to which."""
        write, build = self._write, self._build
        begin = build.sub(write.most(key, row.first), key)
        return begin, build.sub(write.least(build.add(key, number(self._beside)), row.behind), key)

    def _add_values(self, task: Task, row: Row, key: ir.Value, at: ir.Value) -> None:
        """To a row's means those of `beside` values from `key` on, which lie at `at`, that it sees."""
        write, build, lanes = self._write, self._build, self._write.lanes
        begin, end = self._seen(row, key)
        index = build.sub(key, task.start)
        vectors = self._heads.dim // lanes
        for part in self._parts:
            wide = self.fitting(part)
            whole = vectors - vectors % wide
            scores = [write.at(row.scores[head], index) for head in part]
            outs = [write.at(row.out, number(head * self._heads.dim)) for head in part]
            with write.counting(number(0), number(whole * lanes), wide * lanes) as place:
                self._piece(scores, outs, write.at(at, place), place, (begin, end), wide)
            for vector in range(whole, vectors):
                place = number(vector * lanes)
                self._piece(scores, outs, write.at(at, place), place, (begin, end), 1)

    def _piece(
        self,
        scores: Sequence[ir.Value],
        outs: Sequence[ir.Value],
        at: ir.Value,
        place: ir.Value,
        keys: tuple[ir.Value, ir.Value],
        wide: int,
    ) -> None:
        """`wide` vectors from `place` on of some heads."""
        write, build = self._write, self._build
        places = [write.at(out, number(n * write.lanes), place) for out in outs for n in range(wide)]

        def add(key: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            row = write.at(at, write.times(key, self._heads.dim))
            values = [write.load_any(write.at(row, number(n * write.lanes))) for n in range(wide)]
            weights = [write.broadcast(build.load(write.at(own, key))) for own in scores]
            pairs = ((weight, value) for weight in weights for value in values)
            return [write.fma(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

        sums = write.summing(*keys, [write.load(one) for one in places], add)
        for one, total in zip(places, sums, strict=True):
            write.store(total, one)
