"""Attention of single rows over paged keys and values, as code for the processor at hand.

A task is a row and a key/value head: scores of all keys the row sees, their softmax, the mean of the values. Keys are
taken in units that begin at multiples of their size, sums run through the keys in order: a row's bits are a function of
its position, its keys and its query. Nothing is gathered, padded or masked; a row reads its pages where they lie, and
the query heads of a group share each vector read.

Knows registers and loops. Pages and spans are `attention_llvm`'s.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.parts_llvm import FLOAT, INT, Code, Writer, compile_module, host_lanes, number

__all__ = ["Attend", "AttendArguments", "Heads", "compiled"]

_SUMS = 8  # in registers: enough to hide a multiply-add's latency, few enough for AVX2's sixteen registers
_MOST_HEADS = 4  # that share a vector read
_LEAST_SCORE = float("-inf")


class AttendArguments(ctypes.Structure):
    """What the compiled attention reads.

    `q` and `out` (rows, kv_heads · group, D) and `storage` (2 · kv_heads, pages · page_size, D) are float32, a head of
    storage `head_stride` numbers. Row r sees keys `first[r]` … `last[r]`, and `tables[r]` points to its sequence's page
    numbers; all of these are 64-bit integers. `rooms` has a piece of group · `room` numbers for each thread, `room` a
    multiple of 16 and at least the keys of a row and 32 more. `next_room` and `next` are 0 at the start.
    """

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("q", "storage", "out", "first", "last", "tables", "rows", "kv_heads", "head_stride")
        ),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("rooms", "room", "next_room", "next")),
    ]


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention is compiled for: query heads of a key/value head, numbers of a head, positions of a page."""

    group: int
    dim: int
    page_size: int


@dataclass(frozen=True, slots=True)
class Attend:
    """The compiled attention: the address of what a team runs."""

    function: int
    code: Code


@lru_cache(maxsize=8)
def compiled(heads: Heads, lanes: int | None = None) -> Attend:
    """The attention for this processor, or with vectors of another length; a tenth of a second, once."""
    module = ir.Module("attend")
    kind = ir.FunctionType(ir.VoidType(), [INT.as_pointer()])
    whole = math.gcd(heads.dim, lanes or host_lanes())
    _Writing(Writer(ir.Function(module, kind, "attend"), whole), heads).write()
    code = compile_module(module, ["attend"])
    return Attend(code.functions["attend"], code)


@dataclass(frozen=True, slots=True)
class _Task:
    """One row and key/value head: pointers, the keys it sees, and the first key that has a score."""

    q: ir.Value
    keys: ir.Value
    values: ir.Value
    out: ir.Value
    table: ir.Value
    first: ir.Value
    last: ir.Value
    start: ir.Value


class _Writing:
    def __init__(self, write: Writer, heads: Heads) -> None:
        self._write, self._build, self._heads = write, write.build, heads
        self._parts = [range(at, min(at + _MOST_HEADS, heads.group)) for at in range(0, heads.group, _MOST_HEADS)]

    def write(self) -> None:
        """The whole function: rooms for scores, tasks one by one."""
        write, build = self._write, self._build
        fields = write.fields(AttendArguments)
        given = {name: build.load(at) for name, at in fields.items()}
        scale = build.fptrunc(build.bitcast(given["scale"], ir.DoubleType()), FLOAT)
        room = build.inttoptr(given["rooms"], FLOAT.as_pointer())
        mine = write.take(fields["next_room"], number(1))
        room = write.at(room, build.mul(mine, write.times(given["room"], self._heads.group)))
        rooms = [write.at(room, write.times(given["room"], head)) for head in range(self._heads.group)]
        tasks = build.mul(given["rows"], given["kv_heads"])
        with write.taking(fields["next"], number(1), tasks) as (index, _):
            task = self._task(given, index)
            end = self._scores(task, rooms, scale)
            shares = [self._softmax(scores, end) for scores in rooms]
            self._mean(task, rooms, shares)
        build.ret_void()

    def _task(self, given: Mapping[str, ir.Value], index: ir.Value) -> _Task:
        write, build, dim = self._write, self._build, self._heads.dim
        row, head = build.sdiv(index, given["kv_heads"]), build.srem(index, given["kv_heads"])
        q, storage, out = (build.inttoptr(given[name], FLOAT.as_pointer()) for name in ("q", "storage", "out"))
        first, last, table = (
            build.load(write.at(build.inttoptr(given[name], INT.as_pointer()), row))
            for name in ("first", "last", "tables")
        )
        heads = write.times(index, self._heads.group * dim)
        keys = write.at(storage, build.mul(head, given["head_stride"]))
        values = write.at(keys, build.mul(given["kv_heads"], given["head_stride"]))
        start = build.sub(first, build.srem(first, number(_SUMS)))
        table = build.inttoptr(table, INT.as_pointer())
        return _Task(write.at(q, heads), keys, values, write.at(out, heads), table, first, last, start)

    def _row(self, task: _Task, rows: ir.Value, position: ir.Value) -> ir.Value:
        """Where a position's key or value lies."""
        size = number(self._heads.page_size)
        page = self._build.load(self._write.at(task.table, self._build.udiv(position, size)))
        slot = self._build.add(self._build.mul(page, size), self._build.urem(position, size))
        return self._write.at(rows, self._write.times(slot, self._heads.dim))

    def _scores(self, task: _Task, rooms: Sequence[ir.Value], scale: ir.Value) -> ir.Value:
        """Scaled scores of the keys start … last into each head's room, -inf where not seen; their count, filled up."""
        write, build = self._write, self._build
        behind = build.add(task.last, number(1))
        for part in self._parts:
            unit = math.gcd(_beside(part), self._heads.page_size)
            with write.counting(task.start, behind, unit) as key:
                self._unit(task, rooms, scale, part, key, unit)
        lanes = number(write.lanes)
        count = build.sub(behind, task.start)
        end = build.mul(build.sdiv(build.add(count, number(write.lanes - 1)), lanes), lanes)
        hidden = ir.Constant(FLOAT, _LEAST_SCORE)
        for scores in rooms:
            with write.counting(number(0), build.sub(task.first, task.start)) as index:
                build.store(hidden, write.at(scores, index))
            with write.counting(count, end) as index:
                build.store(hidden, write.at(scores, index))
        return end

    def _unit(
        self, task: _Task, rooms: Sequence[ir.Value], scale: ir.Value, part: range, key: ir.Value, unit: int
    ) -> None:
        """Scores of `unit` keys from `key` on, which share a page, for the heads of a part."""
        write, build = self._write, self._build
        at = self._row(task, task.keys, key)

        def add(place: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            keys = [write.load(write.at(at, number(n * self._heads.dim), place)) for n in range(unit)]
            queries = [write.load(write.at(task.q, number(head * self._heads.dim), place)) for head in part]
            pairs = ((query, one) for query in queries for one in keys)
            return [write.fma(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

        zeros = [write.zero] * (unit * len(part))
        sums = write.summing(number(0), number(self._heads.dim), zeros, add, step=write.lanes)
        index = build.sub(key, task.start)
        for place, total in enumerate(sums):
            score = build.fmul(write.folded(total, build.fadd), scale)
            build.store(score, write.at(rooms[part[place // unit]], index, number(place % unit)))

    def _softmax(self, scores: ir.Value, end: ir.Value) -> ir.Value:
        """Scores become powers of e; one over their sum."""
        write, build = self._write, self._build

        def larger(index: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
            return [write.larger(write.load(write.at(scores, index)), most[0])]

        def power(index: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            at = write.at(scores, index)
            value = write.exp(build.fsub(write.load(at), most))
            write.store(value, at)
            return [build.fadd(total[0], value)]

        found = write.summing(number(0), end, [write.constant(_LEAST_SCORE)], larger, step=write.lanes)
        most = write.broadcast(write.folded(found[0], write.larger))
        total = write.summing(number(0), end, [write.zero], power, step=write.lanes)
        return build.fdiv(ir.Constant(FLOAT, 1.0), write.folded(total[0], build.fadd))

    def _mean(self, task: _Task, rooms: Sequence[ir.Value], shares: Sequence[ir.Value]) -> None:
        """The values' mean under the softmax, some vectors of a head at a time."""
        vectors = self._heads.dim // self._write.lanes
        for part in self._parts:
            wide = _beside(part)
            whole = vectors - vectors % wide
            lanes = self._write.lanes
            with self._write.counting(number(0), number(whole * lanes), wide * lanes) as place:
                self._piece(task, rooms, shares, part, place, wide)
            for vector in range(whole, vectors):
                self._piece(task, rooms, shares, part, number(vector * lanes), 1)

    def _piece(
        self,
        task: _Task,
        rooms: Sequence[ir.Value],
        shares: Sequence[ir.Value],
        part: range,
        place: ir.Value,
        wide: int,
    ) -> None:
        """`wide` vectors from `place` on of the heads of a part."""
        write, build = self._write, self._build

        def add(key: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            at = write.at(self._row(task, task.values, key), place)
            values = [write.load(write.at(at, number(n * write.lanes))) for n in range(wide)]
            index = build.sub(key, task.start)
            weights = [write.broadcast(build.load(write.at(rooms[head], index))) for head in part]
            pairs = ((weight, value) for weight in weights for value in values)
            return [write.fma(*pair, total) for pair, total in zip(pairs, sums, strict=True)]

        behind = build.add(task.last, number(1))
        sums = write.summing(task.first, behind, [write.zero] * (wide * len(part)), add)
        for index, total in enumerate(sums):
            head, vector = part[index // wide], index % wide
            result = build.fmul(total, write.broadcast(shares[head]))
            to = write.at(task.out, number(head * self._heads.dim + vector * write.lanes), place)
            write.store(result, to)


def _beside(part: range) -> int:
    """Sums of each head of a part that fit beside those of the others: a power of two."""
    return _SUMS // (1 << (len(part) - 1).bit_length())
