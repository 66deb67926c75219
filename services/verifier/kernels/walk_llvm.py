"""A request on its way along its rows, in code for the processor at hand: what all rules need of it.

Knows arguments, rows and the target's own choice at a row. What stands is `judge_llvm`'s and `trial_llvm`'s affair.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from llvmlite import ir

from dspark.kernels.logits import BLOCK
from dspark.kernels.noise import Stream
from dspark.kernels.noise_llvm import gumbel, uniform
from dspark.kernels.parts_llvm import DOUBLE, INT, Writer, host_lanes, number
from services.verifier.kernels.law_llvm import FIGURES, MARKED, Law, Room, Row
from services.verifier.kernels.numbers_llvm import Element

__all__ = ["FIELDS", "ZERO", "JudgeArguments", "Request", "Walk", "room_sizes"]

FIELDS = "kind", "first_row", "drafts", "count", "position", "seed"
ZERO = ir.Constant(DOUBLE, 0.0)


class JudgeArguments(ctypes.Structure):
    """What the compiled walks read.

    `logits` (any, blocks · BLOCK), rows `stride` numbers apart, `high` of whose blocks are weighed token by token;
    `requests` (tasks, FIELDS) int64, `temperatures` (tasks,) float64. Request r's drafts are `tokens[drafts]` … ; draft
    d was drawn from `ids` and `shares` (float64) `begins[d]` … `begins[d + 1]` - 1, itself with `owns[d]` (float64).
    `out` (tasks, 3). A law's head has `most` tokens. Where `logits` are bounds, `states` (any, pairs) int32 are their
    rows, `table` (vocabulary, pairs) the head's weights, two bfloat16s each, and `tops` float32 the greatest of every
    `PEAKED` bounds, rows `tops_stride` apart; 0 where there are none. `rooms`: of each part of `room_sizes` the place
    of the first thread's, then how many bytes a thread has.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "logits", "stride", "blocks", "most", "high", "requests", "temperatures", "tokens", "begins", "ids",
            "shares", "owns", "out", "states", "table", "pairs", "tops", "tops_stride", "figures", "marks", "sums",
            "weights", "inner", "peaks", "room_ids", "keys", "piece", "next_room", "tasks", "next",
        )
    ]  # fmt: skip


def room_sizes(blocks: int, most: int) -> Mapping[str, int]:
    """Bytes of a thread's room, part by part in the order of `Room`."""
    width, lanes = blocks * BLOCK, host_lanes()
    marks = blocks // MARKED + 2
    long = {"figures": FIGURES, "marks": marks, "sums": blocks + lanes, "weights": most, "inner": BLOCK}
    short = {"peaks": blocks + lanes, "room_ids": width + lanes, "keys": width + lanes}
    return {name: 8 * count for name, count in long.items()} | {name: 4 * count for name, count in short.items()}


@dataclass(frozen=True, slots=True)
class Request:
    """The fields of the request on its way."""

    kind: ir.Value
    first_row: ir.Value
    drafts: ir.Value
    count: ir.Value
    position: ir.Value
    seed: ir.Value
    temperature: ir.Value


class Walk:
    """Writes parts of the whole function.

    The state of the request's walk: `at` drafts stand, `token` follows them, it is `going` on, its rows are `sound`.
    Of a draw by inverse cumulation: `block` and `aim`.
    """

    def __init__(self, write: Writer, element: Element, law: Law) -> None:
        self.write, self.build, self.element, self.law = write, write.build, element, law
        build, self.fields = write.build, write.fields(JudgeArguments)
        self.given = {name: build.load(at) for name, at in self.fields.items()}
        self.at, self.token, self.going, self.sound = (build.alloca(INT) for _ in range(4))
        self._held = build.alloca(INT)  # the row whose law is in the room
        self.block, self._place = (build.alloca(INT) for _ in range(2))
        self._best, self.aim, self._sum, self._running = (build.alloca(DOUBLE) for _ in range(4))
        mine = build.mul(write.take(self.fields["next_room"], number(1)), self.given["piece"])
        parts = (build.add(self.given[name], mine) for name in room_sizes(1, 1))
        self.room = Room(*(build.inttoptr(part, kind) for part, kind in zip(parts, Room.kinds, strict=True)))

    # ------------------------------------------------------------ rows

    def row(self, request: Request, at: ir.Value) -> ir.Value:
        """Where the logits lie that decide the token behind `at` drafts."""
        write, build = self.write, self.build
        logits = build.inttoptr(self.given["logits"], self.element.stored.as_pointer())
        return write.at(logits, build.mul(build.add(request.first_row, at), self.given["stride"]))

    def tops(self, request: Request, at: ir.Value) -> ir.Value:
        """Where its blocks' greatest lie; null where they are not known."""
        write, build, tops = self.write, self.build, self.given["tops"]
        own = build.mul(build.add(request.first_row, at), build.mul(self.given["tops_stride"], number(4)))
        known = build.icmp_signed("!=", tops, number(0))
        return write.floats(build.select(known, build.add(tops, own), number(0)))

    def draft(self, request: Request, at: ir.Value) -> ir.Value:
        """The draft token at a place."""
        tokens = self.write.integers(self.given["tokens"])
        return self.build.load(self.write.at(tokens, request.drafts, at))

    def begin(self) -> None:
        """Start a request's walk."""
        for value, start in ((self.at, 0), (self.token, -1), (self.sound, 1), (self._held, -1)):
            self.build.store(number(start), value)

    @contextmanager
    def measured(self, request: Request, at: ir.Value) -> Iterator[Row]:
        """What is done where the row behind `at` drafts is sound; `sound` becomes 0 where it is not."""
        build, x = self.build, self.row(request, at)
        with build.if_then(build.icmp_signed("!=", build.load(self._held), at)):
            sizes = (self.given[name] for name in ("blocks", "most", "high"))
            arguments = [x, self.tops(request, at), *sizes, request.temperature, *self.room.pointers()]
            found = build.icmp_signed(">", build.call(self.law.measure, arguments), number(0))
            build.store(build.zext(found, INT), self.sound)
            build.store(at, self._held)
        with build.if_then(self.is_set(self.sound)):
            yield Row(self.write, self.element, x, request.temperature, self.room)

    # ------------------------------------------------------------ the target's choice

    def choose(self, request: Request, row: Row) -> None:
        """As `dspark.sampling.choice.choose`: of the head by noise, all others as one, and only then among them."""
        write, build, room = self.write, self.build, self.room
        position = build.add(request.position, build.load(self.at))
        noise = gumbel(write, request.seed, number(0), position, Stream.REST)
        build.store(build.fadd(write.double("log", row.rest), noise), self._best)
        build.store(number(-1), self.token)
        with write.counting(number(0), self.heads()) as place:
            token = build.sext(build.load(write.at(room.ids, place)), INT)
            noise = gumbel(write, request.seed, token, position, Stream.TOKEN)
            score = build.fadd(build.load(write.at(room.weights, place)), noise)
            with build.if_then(build.fcmp_ordered(">", score, build.load(self._best))):
                build.store(score, self._best)
                build.store(token, self.token)
        with build.if_then(self.is_unset(self.token)):
            u = uniform(build, request.seed, number(0), position, Stream.REST_PICK)
            build.store(build.fmul(u, row.rest), self.aim)
            self.find_block()
            self.fill(request, row)
            self.pick()

    def heads(self) -> ir.Value:
        """Tokens of a head."""
        return self.write.least(self.given["most"], self.write.times(self.given["blocks"], BLOCK))

    def fill(self, request: Request, row: Row) -> None:
        """Weights of the block found, but those of the head, into `inner`."""
        block = self.build.load(self.block)
        self.build.call(self.law.fill, [row.x, block, request.temperature, *self.room.pointers()])

    def find_block(self, *, changed: bool = False) -> None:
        """The block in which the running sum passes the aim, the last of any weight at the most; the aim inside it.

        `changed`: the sums are no longer those that were added up.
        """
        write, build, all_ = self.write, self.build, self.given["blocks"]
        if changed:
            self._cumulate(self.room.sums, number(0), all_, self.block, ZERO)
        else:
            start = self._find_mark()
            before = build.load(write.at(self.room.marks, build.load(self._place)))
            end = write.least(build.add(start, number(MARKED)), all_)
            self._cumulate(self.room.sums, start, end, self.block, before)
        own = build.load(write.at(self.room.sums, build.load(self.block)))
        build.store(build.fdiv(build.fsub(build.load(self.aim), build.load(self._running)), own), self.aim)

    def pick(self) -> None:
        """The token inside the block whose weights are in `inner`, the aim being a share of them.

        None, and the token that is there stays, where all are 0: a block's sum may have been rounding.
        """
        write, build, inner = self.write, self.build, self.room.inner

        def add(place: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            return [build.fadd(total[0], build.load(write.at(inner, place)))]

        total = write.summing(number(0), number(BLOCK), [ZERO], add)[0]
        with build.if_then(build.fcmp_ordered(">", total, ZERO)):
            build.store(build.fmul(build.load(self.aim), total), self.aim)
            self._cumulate(inner, number(0), number(BLOCK), self._place, ZERO)
            build.store(build.add(write.times(build.load(self.block), BLOCK), build.load(self._place)), self.token)

    def _find_mark(self) -> ir.Value:
        """The first of the marked blocks, whose mark's number is left in `_place`, that hold the one looked for."""
        write, build, marks = self.write, self.build, self.room.marks
        build.store(number(0), self._place)
        count = build.udiv(build.add(self.given["blocks"], number(MARKED - 1)), number(MARKED))
        with write.counting(number(0), count) as mark:
            before, behind = (build.load(write.at(marks, mark, number(next_))) for next_ in (0, 1))
            near = build.fcmp_ordered("<=", before, build.load(self.aim))
            with build.if_then(build.and_(near, build.fcmp_ordered("<", before, behind))):
                build.store(mark, self._place)
        return build.mul(build.load(self._place), number(MARKED))

    def _cumulate(self, numbers: ir.Value, start: ir.Value, end: ir.Value, place: ir.Value, before: ir.Value) -> None:
        """`place`: the last of the positive numbers before which the sum, left in `_running`, is not above the aim."""
        write, build = self.write, self.build
        build.store(start, place)
        build.store(before, self._running)
        build.store(before, self._sum)
        with write.counting(start, end) as index:
            own, before = build.load(write.at(numbers, index)), build.load(self._sum)
            with build.if_then(build.fcmp_ordered(">", own, ZERO)):
                with build.if_then(build.fcmp_ordered("<=", before, build.load(self.aim))):
                    build.store(index, place)
                    build.store(before, self._running)
                build.store(build.fadd(before, own), self._sum)

    # ------------------------------------------------------------ small things

    def is_set(self, value: ir.Value) -> ir.Value:
        """Whether a flag is 1."""
        return self.build.icmp_signed("==", self.build.load(value), number(1))

    def is_unset(self, token: ir.Value) -> ir.Value:
        """Whether no token is there yet."""
        return self.build.icmp_signed("<", self.build.load(token), number(0))

    def smaller(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two float64s."""
        return self.build.select(self.build.fcmp_ordered("<", a, b), a, b)
