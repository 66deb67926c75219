"""Attention over bfloat16 keys and values by products of pairs (AVX512-BF16), as code for the processor at hand.

As `attend_llvm`, with two multiplications a lane and no widening: queries and weights are rounded to bfloat16, as
torch's own models have them, sums are float32. A score pairs numbers of a head, a mean pairs positions, an even one and
the next. Weights are powers of e, rounded, and their sum is what means are divided by in the end.

Where things lie meanwhile: a row's rounded queries in its `out`, then its sums, in the order in which pairs of values
lie beside each other; weights over its scores, in half their room, and one over their sum in the room's last place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.attend_llvm import LEAST_SCORE, Heads, Row, Task, Writing
from dspark.kernels.parts_llvm import FLOAT, HALF, INT32, compile_module, host_has, host_lanes, kernel, number

__all__ = ["compiled", "fits"]

_LANES = 16
_PAIRED = 2 * _LANES
_LINE = 64  # bytes
_LEAST = -87.0  # a score so far below the greatest weighs nothing
_HALVES, _WORDS = ir.VectorType(HALF, _PAIRED), ir.VectorType(INT32, _LANES)
# Of two rows of 32 numbers, those that lie beside each other: of every eight the first four pairs, and the last four.
_BESIDE = [[8 * eight + n + of for eight in range(4) for n in range(at, at + 4) for of in (0, 32)] for at in (0, 4)]
# And of their sums the first sixteen in order, and the last.
_IN_ORDER = [[16 * of + 4 * eight + n for eight in (two, two + 1) for of in (0, 1) for n in range(4)] for two in (0, 2)]


def fits(heads: Heads) -> bool:
    """Whether this processor, and such heads and pages, can have it."""
    able = host_lanes() == _LANES and host_has("avx512bf16")
    return able and heads.rounded and heads.dim % _PAIRED == 0 and heads.page_size % 2 == 0


@lru_cache(maxsize=8)
def compiled(heads: Heads) -> int:
    """Where the code for a team lies; a tenth of a second, once."""
    module = ir.Module("attend_dots")
    _Dotting(kernel(module, "attend", _LANES), heads).write()
    return compile_module(module, ["attend"]).functions["attend"]


class _Dotting(Writing):
    sums = 16

    # ---- scores

    def _scores(self, task: Task, room: ir.Value) -> None:
        with self._write.counting(task.begin, task.end) as number_:
            row = self._row(task, room, number_)
            for head in range(self._heads.group):
                self._round(row, head * self._heads.dim)
        super()._scores(task, room)

    def _read_ahead(self, task: Task, rows: ir.Value, key: ir.Value, count: int) -> None:
        """Ask for `count` keys or values, as many as lie beside each other behind `key`: pages lie anywhere."""
        write, build = self._write, self._build
        ahead = build.add(key, number(self._beside))
        with build.if_then(build.icmp_signed("<", ahead, task.behind)):
            at = self._lying(task, rows, ahead)
            for line in range(0, count * self._heads.dim * 2, _LINE):
                write.prefetch(at, line)

    def _round(self, row: Row, head: int) -> None:
        """A head's query into its `out`."""
        write = self._write
        to = write.build.bitcast(write.at(row.out, number(head)), HALF.as_pointer())
        with write.counting(number(0), number(self._heads.dim), _LANES) as place:
            self._narrow(write.load(write.at(row.q, number(head), place)), write.at(to, place))

    def _unit(self, row: Row, part: range, at: ir.Value, index: ir.Value, unit: int) -> None:
        write, build, dim = self._write, self._build, self._heads.dim

        def add(place: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            half = build.sdiv(place, number(2))
            keys = [write.load(write.at(at, number(n * dim), place), _WORDS) for n in range(unit)]
            queries = [write.load(write.at(row.out, number(head * dim), half), _WORDS) for head in part]
            pairs = ((query, one) for query in queries for one in keys)
            return [self._dot(total, *pair) for pair, total in zip(pairs, sums, strict=True)]

        zeros = [write.zero] * (unit * len(part))
        sums = write.summing(number(0), number(dim), zeros, add, step=_PAIRED)
        scores = build.fmul(write.folded_together(sums, build.fadd), write.broadcast(self._given["scale"]))
        for place, head in enumerate(part):
            own = [place * unit + n for n in range(unit)]
            write.store(self._picked(scores, scores, own), write.at(row.scores[head], index))

    # ---- means

    def _means(self, task: Task, room: ir.Value) -> None:
        super()._means(task, room)
        with self._write.counting(task.begin, task.end) as number_:
            row = self._row(task, room, number_)
            for head, scores in enumerate(row.scores):
                self._finish(self._write.at(row.out, number(head * self._heads.dim)), self._last(scores))

    def _softmax(self, task: Task, row: Row, scores: ir.Value) -> None:
        """Scores become rounded powers of e; those of keys that the row does not see, up to whole vectors, 0."""
        write, build = self._write, self._build
        begin, end = self._hide(task, row, scores)
        weights = build.bitcast(scores, HALF.as_pointer())

        def larger(index: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
            return [write.larger(write.load(write.at(scores, index)), most[0])]

        def power(index: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            below = build.fsub(write.load(write.at(scores, index)), most)
            seen = build.select(build.fcmp_ordered("<", below, write.constant(_LEAST)), write.zero, write.exp(below))
            broken = build.fcmp_unordered("uno", below, below)
            at = write.at(weights, index)
            self._narrow(build.select(broken, below, seen), at)
            return [build.fadd(total[0], write.load_any(at))]

        found = write.summing(begin, end, [write.constant(LEAST_SCORE)], larger, step=_LANES)
        most = write.broadcast(write.folded(found[0], write.larger))
        total = write.folded(write.summing(begin, end, [write.zero], power, step=_LANES)[0], build.fadd)
        build.store(build.fdiv(ir.Constant(FLOAT, 1.0), total), self._last(scores))

    def _add_values(self, task: Task, row: Row, key: ir.Value, at: ir.Value) -> None:
        write, build, dim = self._write, self._build, self._heads.dim
        begin, end = self._seen(row, key)
        index = build.sub(key, task.start)
        for part in self._parts:
            wide = math.gcd(max(1, self.fitting(part) // 2), dim // _PAIRED)
            weights = [write.at(build.bitcast(row.scores[head], HALF.as_pointer()), index) for head in part]
            outs = [write.at(row.out, number(head * dim)) for head in part]
            with write.counting(number(0), number(dim), wide * _PAIRED) as place:
                self._piece(weights, outs, write.at(at, place), place, (begin, end), wide)

    def _piece(
        self,
        scores: Sequence[ir.Value],
        outs: Sequence[ir.Value],
        at: ir.Value,
        place: ir.Value,
        keys: tuple[ir.Value, ir.Value],
        wide: int,
    ) -> None:
        """Twice `wide` vectors of sums from `place` on of some heads; an unseen half of a pair is its other half."""
        write, build, (begin, end) = self._write, self._build, keys
        places = [write.at(out, number(n * _LANES), place) for out in outs for n in range(2 * wide)]

        def add(pair: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            even, odd = write.times(pair, 2), build.add(write.times(pair, 2), number(1))
            own = (write.most(even, begin), write.least(odd, build.sub(end, number(1))))
            rows = [write.at(at, write.times(one, self._heads.dim)) for one in own]
            pieces = ([write.at(row, number(n * _PAIRED)) for row in rows] for n in range(wide))
            values = [value for piece in pieces for value in self._pairs(*piece)]
            both = [build.bitcast(write.at(weights, even), INT32.as_pointer()) for weights in scores]
            weights = [write.broadcast(build.load(one, align=4)) for one in both]
            products = ((weight, value) for weight in weights for value in values)
            return [self._dot(total, *product) for product, total in zip(products, sums, strict=True)]

        pairs = build.sdiv(begin, number(2)), build.sdiv(build.add(end, number(1)), number(2))
        sums = write.summing(*pairs, [write.load(one) for one in places], add)
        for one, total in zip(places, sums, strict=True):
            write.store(total, one)

    def _pairs(self, *rows: ir.Value) -> list[ir.Value]:
        """32 numbers of two rows, beside each other."""
        build = self._build
        one, other = (build.load(build.bitcast(row, _HALVES.as_pointer()), align=2) for row in rows)
        return [build.bitcast(self._picked(one, other, order), _WORDS) for order in _BESIDE]

    def _finish(self, out: ir.Value, share: ir.Value) -> None:
        """A head's sums in order, times its share."""
        write, build = self._write, self._build
        share = write.broadcast(build.load(share))
        with write.counting(number(0), number(self._heads.dim), _PAIRED) as place:
            places = [write.at(out, place, number(n)) for n in (0, _LANES)]
            low, high = (write.load(one) for one in places)
            for one, order in zip(places, _IN_ORDER, strict=True):
                write.store(build.fmul(self._picked(low, high, order), share), one)

    # ---- small things

    def _last(self, scores: ir.Value) -> ir.Value:
        return self._write.at(scores, self._given["room"], number(-1))

    def _dot(self, total: ir.Value, one: ir.Value, other: ir.Value) -> ir.Value:
        return self._write.call("x86.avx512bf16.dpbf16ps.512", self._write.vector, total, one, other)

    def _narrow(self, value: ir.Value, at: ir.Value) -> None:
        """A vector, rounded to bfloat16, to where halves lie."""
        halves = ir.VectorType(HALF, _LANES)
        found = self._write.call("x86.avx512bf16.cvtneps2bf16.512", halves, value)
        self._build.store(found, self._build.bitcast(at, halves.as_pointer()), align=2)

    def _picked(self, one: ir.Value, other: ir.Value, order: Sequence[int]) -> ir.Value:
        return self._build.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT32, len(order)), list(order)))
