"""The target's choice where rows hold bounds on logits, in code for the processor: rules of `services.verifier.race`.

Reads logits themselves from the head's table, one at a time, in the very steps of the compiled product over all of
them: a sum runs through the inputs in order, two of them a step.
"""

from __future__ import annotations

from llvmlite import ir

from dspark.kernels.forms_llvm import Dots
from dspark.kernels.logits import BLOCK
from dspark.kernels.noise import Stream
from dspark.kernels.noise_llvm import gumbel, uniform
from dspark.kernels.parts_llvm import DOUBLE, FLOAT, INT, INT32, Writer, number
from services.verifier.kernels.law_llvm import Row
from services.verifier.kernels.numbers_llvm import function, ordered
from services.verifier.kernels.walk_llvm import ZERO, Request, Walk
from services.verifier.race import MOST_ARRIVALS, MOST_BELOW, MOST_LOOKED_UP, OUT_OF_REACH

__all__ = ["UNDECIDED", "RaceWalk"]

UNDECIDED = 2
"""In place of whether a row's logits were sound: they are wanted, all of them."""


class RaceWalk:
    """Writes choices at single rows."""

    def __init__(self, walk: Walk) -> None:
        self._walk, self._write, self._build, self._room = walk, walk.write, walk.build, walk.room
        build = walk.build
        self._exact = _declare_exact(walk.write)
        self._logit = build.alloca(FLOAT)
        self._best, self._front, self._since = (build.alloca(DOUBLE) for _ in range(3))
        self._first, self._place, self._top, self._arrival, self._running = (build.alloca(INT) for _ in range(5))
        self._looked_up = build.alloca(INT)

    # ------------------------------------------------------------ the greatest logit

    def overtake(self, request: Request, at: ir.Value) -> None:
        """The token of the greatest logit, the lowest of equal ones, from the one of the greatest bound."""
        write, build, walk, room = self._write, self._build, self._walk, self._room
        first = build.load(walk.token)
        build.store(first, self._first)
        build.store(number(0), self._looked_up)
        build.store(self.exact(request, at, first), self._logit)
        with write.counting(number(0), walk.given["blocks"]) as block:
            peak = build.load(write.at(room.peaks, block))
            with build.if_then(build.icmp_signed(">=", peak, ordered(write, build.load(self._logit)))):
                start = write.times(block, BLOCK)
                with write.counting(start, build.add(start, number(BLOCK))) as token:
                    self._contend(request, at, token)
        with build.if_then(build.icmp_signed(">=", build.load(self._looked_up), number(MOST_LOOKED_UP))):
            self._leave()

    def _contend(self, request: Request, at: ir.Value, token: ir.Value) -> None:
        build, walk = self._build, self._walk
        other = build.icmp_signed("!=", token, build.load(self._first))
        high = build.fcmp_ordered(">=", self._bound(request, at, token), build.load(self._logit))
        decided = build.icmp_signed("<", build.load(self._looked_up), number(MOST_LOOKED_UP))
        with build.if_then(build.and_(build.and_(other, high), decided)):
            build.store(build.add(build.load(self._looked_up), number(1)), self._looked_up)
            logit, best = self.exact(request, at, token), build.load(self._logit)
            lower = build.icmp_signed("<", token, build.load(walk.token))
            ahead = build.and_(build.fcmp_ordered("==", logit, best), lower)
            with build.if_then(build.or_(build.fcmp_ordered(">", logit, best), ahead)):
                build.store(logit, self._logit)
                build.store(token, walk.token)

    # ------------------------------------------------------------ a choice by noise

    def choose(self, request: Request, row: Row) -> None:
        """A token by the head's noise, or one of the others that arrives before it."""
        build, walk = self._build, self._walk
        at = build.load(walk.at)
        position = build.add(request.position, at)
        self._enter(request, position)
        top = self._difference(request, at, build.load(self._top))
        with build.if_else(self._ends(request, row, top)) as (then, otherwise):
            with then:
                self._run(request, at)
                self._arrive(request, row, at, position)
            with otherwise:
                self._leave()

    def _ends(self, request: Request, row: Row, top: ir.Value) -> ir.Value:
        """Whether arrivals do, `top` being how far the token of the greatest bound lies below it."""
        write, build = self._write, self._build
        bearable = build.fmul(build.fmul(write.double("exp", top), row.head), _double(MOST_ARRIVALS))
        few = build.fcmp_ordered("<=", row.rest, bearable)
        near = build.fcmp_ordered(">=", top, _double(-MOST_BELOW))
        edge = build.fdiv(build.fsub(build.fpext(row.edge()[0], DOUBLE), row.greatest), request.temperature)
        far = build.fcmp_ordered("<=", edge, build.fsub(top, _double(OUT_OF_REACH)))
        return build.or_(far, build.and_(near, few))

    def _leave(self) -> None:
        """To whoever has all logits."""
        self._build.store(number(UNDECIDED), self._walk.sound)
        self._build.store(number(-1), self._walk.token)

    def _enter(self, request: Request, position: ir.Value) -> None:
        """Noise onto the head's log weights; the place of the greatest sum, and the token of the greatest bound."""
        write, build, walk, room = self._write, self._build, self._walk, self._room
        build.store(ir.Constant(DOUBLE, float("-inf")), self._front)
        build.store(number(-1), self._top)
        with write.counting(number(0), walk.heads()) as place:
            token, at = self._listed(place), write.at(room.weights, place)
            weight = build.load(at)
            first = build.and_(build.fcmp_ordered("==", weight, ZERO), walk.is_unset(self._top))
            with build.if_then(first):
                build.store(token, self._top)
            score = build.fadd(weight, gumbel(write, request.seed, token, position, Stream.TOKEN))
            build.store(score, at)
            with build.if_then(build.fcmp_ordered(">", score, build.load(self._front))):
                build.store(score, self._front)
                build.store(place, self._place)

    def _run(self, request: Request, at: ir.Value) -> None:
        """The head's winner by its logits: the one in front by bounds, then all that these leave a chance."""
        write, build, walk = self._write, self._build, self._walk
        front = build.load(self._place)
        build.store(self._listed(front), walk.token)
        build.store(self._corrected(request, at, front), self._best)
        with write.counting(number(0), walk.heads()) as place:
            high = build.fcmp_ordered(">", self._score(place), build.load(self._best))
            with build.if_then(build.and_(high, build.icmp_signed("!=", place, front))):
                score = self._corrected(request, at, place)
                with build.if_then(build.fcmp_ordered(">", score, build.load(self._best))):
                    build.store(score, self._best)
                    build.store(self._listed(place), walk.token)

    def _arrive(self, request: Request, row: Row, at: ir.Value, position: ir.Value) -> None:
        """All others: arrivals one by one until one is taken, or comes too late."""
        write, build = self._write, self._build
        build.store(ZERO, self._since)
        build.store(number(0), self._arrival)
        build.store(number(1), self._running)
        with write.while_set(self._running):
            arrival = build.load(self._arrival)
            waited = write.double("log", uniform(write.build, request.seed, arrival, position, Stream.REST))
            build.store(build.fsub(build.load(self._since), waited), self._since)
            logs = (write.double("log", value) for value in (row.rest, build.load(self._since)))
            build.store(number(0), self._running)
            with build.if_then(build.fcmp_ordered(">", build.fsub(*logs), build.load(self._best))):
                self._try(request, row, at, (position, arrival))
                build.store(build.add(arrival, number(1)), self._arrival)

    def _try(self, request: Request, row: Row, at: ir.Value, key: tuple[ir.Value, ir.Value]) -> None:
        """An arrival is one of the others by their bounds, and taken as often as its logit is worth."""
        write, build, walk, (position, arrival) = self._write, self._build, self._walk, key
        before = build.load(walk.token)
        picked = uniform(build, request.seed, arrival, position, Stream.REST_PICK)
        build.store(build.fmul(picked, row.rest), walk.aim)
        build.store(number(-1), walk.token)
        walk.find_block()
        walk.fill(request, row)
        walk.pick()
        build.store(number(1), self._running)
        token = build.load(walk.token)
        with build.if_then(build.icmp_signed(">=", token, number(0))):
            low, peak = row.low(build.load(walk.block))
            rate = build.select(low, peak, self._bound(request, at, token))
            worth = write.double("exp", self._below(request, at, token, rate))
            kept = uniform(build, request.seed, arrival, position, Stream.REST_KEEP)
            with build.if_then(build.fcmp_ordered("<", kept, worth)):
                build.store(number(0), self._running)
        with build.if_then(walk.is_set(self._running)):
            build.store(before, walk.token)

    # ------------------------------------------------------------ logits and bounds

    def exact(self, request: Request, at: ir.Value, token: ir.Value) -> ir.Value:
        """A logit, float32, of the row behind `at` drafts."""
        write, build, given = self._write, self._build, self._walk.given
        places = (build.add(request.first_row, at), token)
        rows = zip(("states", "table"), places, strict=True)
        pairs = given["pairs"]
        pointers = [
            write.at(build.inttoptr(given[name], INT32.as_pointer()), build.mul(place, pairs)) for name, place in rows
        ]
        return build.call(self._exact, [*pointers, pairs])

    def _bound(self, request: Request, at: ir.Value, token: ir.Value) -> ir.Value:
        return self._build.load(self._write.at(self._walk.row(request, at), token))

    def _difference(self, request: Request, at: ir.Value, token: ir.Value) -> ir.Value:
        """A logit less its bound."""
        return self._below(request, at, token, self._bound(request, at, token))

    def _below(self, request: Request, at: ir.Value, token: ir.Value, bound: ir.Value) -> ir.Value:
        """A logit less a bound on it, float64, in units of the temperature."""
        build = self._build
        wide = [build.fpext(x, DOUBLE) for x in (self.exact(request, at, token), bound)]
        return build.fdiv(build.fsub(*wide), request.temperature)

    def _listed(self, place: ir.Value) -> ir.Value:
        return self._build.sext(self._build.load(self._write.at(self._room.ids, place)), INT)

    def _score(self, place: ir.Value) -> ir.Value:
        return self._build.load(self._write.at(self._room.weights, place))

    def _corrected(self, request: Request, at: ir.Value, place: ir.Value) -> ir.Value:
        """The score of a place in the head, with the logit for its bound."""
        return self._build.fadd(self._score(place), self._difference(request, at, self._listed(place)))


def _double(value: float) -> ir.Constant:
    return ir.Constant(DOUBLE, value)


def _declare_exact(write: Writer) -> ir.Function:
    """A function (row, weights, pairs): the product of two rows of bfloat16 as `forms_llvm.Dots` adds it up."""
    address = INT32.as_pointer()
    made = function(write.function.module, "exact", FLOAT, [address, address, INT])
    inner, form = Writer(made, write.lanes), Dots(write.lanes)
    x, weights, pairs = made.args

    def add(k: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
        one, half = (inner.broadcast(inner.build.load(inner.at(row, k))) for row in (x, weights))
        return [form.add(inner, one, half, total[0])]

    total = inner.summing(number(0), pairs, [inner.zero], add)[0]
    inner.build.ret(inner.build.extract_element(total, ir.Constant(INT32, 0)))
    return made
