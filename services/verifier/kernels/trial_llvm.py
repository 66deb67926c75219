"""A block of drafts on trial as one, in code for the processor at hand: the rules of `services.verifier.trial`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from dspark.kernels.logits import BLOCK
from dspark.kernels.noise import Stream
from dspark.kernels.noise_llvm import uniform
from dspark.kernels.parts_llvm import DOUBLE, INT, number
from services.verifier.kernels.law_llvm import Row
from services.verifier.kernels.walk_llvm import ZERO, Request, Walk

__all__ = ["TrialWalk"]

_ONE = ir.Constant(DOUBLE, 1.0)


class TrialWalk:
    """Writes the walk of a request in rejection mode."""

    def __init__(self, walk: Walk) -> None:
        self._walk, self._write, self._build, self._room = walk, walk.write, walk.build, walk.room
        build = walk.build
        self._w, self._left, self._p, self._shared = (build.alloca(DOUBLE) for _ in range(4))
        self._stood = build.alloca(INT)

    def follow(self, request: Request) -> None:
        """A block on trial (`Trial`), then a token from what is left at the row behind those that stand."""
        write, build, walk = self._write, self._build, self._walk
        for value, start in ((self._w, _ONE), (self._left, _ONE), (self._stood, number(0)), (walk.going, number(1))):
            build.store(start, value)
        with write.counting(number(0), request.count) as at, build.if_then(walk.is_set(walk.going)):
            build.store(number(0), walk.going)
            build.store(at, walk.at)
            with walk.measured(request, at) as row:
                self._meet(request, row, at)
                self._go_on(request, at)
        sound, stand = walk.is_set(walk.sound), walk.is_set(walk.going)
        with build.if_then(sound):
            at = build.select(stand, request.count, build.load(self._stood))
            build.store(at, walk.at)
            with walk.measured(request, at) as row:
                walk.choose(request, row)  # where all stand, and where nothing is left of a fallen one
                with build.if_then(build.not_(stand)):
                    self._draw_left(request, row, at)

    def _support(self, request: Request, at: ir.Value) -> tuple[ir.Value, ir.Value]:
        begins = self._write.integers(self._walk.given["begins"])
        first = self._write.at(begins, request.drafts, at)
        return self._build.load(first), self._build.load(self._write.at(first, number(1)))

    @contextmanager
    def _drafted(self, request: Request, at: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """Around what is done for each token that could have been drafted: the token and q."""
        write, build = self._write, self._build
        ids, shares = write.integers(self._walk.given["ids"]), write.doubles(self._walk.given["shares"])
        with write.counting(*self._support(request, at)) as index:
            yield build.load(write.at(ids, index)), build.load(write.at(shares, index))

    def _meet(self, request: Request, row: Row, at: ir.Value) -> None:
        """Find p of the draft token, and the sum of min(w p, q)."""
        build, draft = self._build, self._walk.draft(request, at)
        build.store(ZERO, self._shared)
        with self._drafted(request, at) as (token, q):
            p = build.fdiv(row.weight(token), row.total)
            least = self._walk.smaller(build.fmul(build.load(self._w), p), q)
            build.store(build.fadd(build.load(self._shared), least), self._shared)
            with build.if_then(build.icmp_signed("==", token, draft)):
                build.store(p, self._p)

    def _go_on(self, request: Request, at: ir.Value) -> None:
        """As `Trial.goes_on`; it also ends where nothing behind can stand."""
        build, w = self._build, self._build.load(self._w)
        left = build.fsub(w, build.load(self._shared))
        left = build.select(build.fcmp_ordered(">", left, ZERO), left, ZERO)
        with build.if_then(build.icmp_signed(">", at, number(0))):
            u = self._number(request, build.sub(at, number(1)), Stream.ACCEPT)
            most = build.fmul(u, build.fsub(build.fadd(left, _ONE), w))
            with build.if_then(build.fcmp_ordered("<", most, left)):
                build.store(at, self._stood)
                build.store(w, self._left)
        following = build.fdiv(build.fmul(w, build.load(self._p)), self._own(request, at))
        build.store(self._walk.smaller(following, _ONE), self._w)
        self._hope(request, at)

    def _hope(self, request: Request, at: ir.Value) -> None:
        """Go on where some j > `at` tokens may stand: h_j <= w_j <= w_i / (q_{i+1} … q_j), whatever p is there."""
        write, build, walk = self._write, self._build, self._walk

        def reach(k: ir.Value, bound: list[ir.Value]) -> list[ir.Value]:
            below = build.fcmp_ordered("<", self._number(request, k, Stream.ACCEPT), bound[0])
            with build.if_then(below):
                build.store(number(1), walk.going)
            following = write.least(build.add(k, number(1)), build.sub(request.count, number(1)))
            return [build.fdiv(bound[0], self._own(request, following))]

        write.summing(at, request.count, [build.load(self._w)], reach)

    def _own(self, request: Request, at: ir.Value) -> ir.Value:
        """Share q of the draft token itself."""
        owns = self._write.doubles(self._walk.given["owns"])
        return self._build.load(self._write.at(owns, request.drafts, at))

    def _draw_left(self, request: Request, row: Row, at: ir.Value) -> None:
        """A token from max(0, w p - q), by inverse cumulation; the one that is there stays where nothing is left."""
        write, build, room = self._write, self._build, self._room
        worth = build.fdiv(row.total, build.load(self._left))  # of a share of q, in weights
        with write.counting(number(0), self._walk.heads()) as place:
            block = build.sdiv(build.sext(build.load(write.at(room.ids, place)), INT), number(BLOCK))
            self._add(block, write.double("exp", build.load(write.at(room.weights, place))))
        with self._drafted(request, at) as (token, q):
            taken = self._walk.smaller(row.weight(token), build.fmul(q, worth))
            self._add(build.sdiv(token, number(BLOCK)), build.fneg(taken))

        def add(block: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            own = build.load(write.at(room.sums, block))
            return [build.fadd(total[0], build.select(build.fcmp_ordered(">", own, ZERO), own, ZERO))]

        total = write.summing(number(0), self._walk.given["blocks"], [ZERO], add)[0]
        with build.if_then(build.fcmp_ordered(">", total, ZERO)):
            build.store(build.fmul(self._number(request, at, Stream.RESIDUAL), total), self._walk.aim)
            self._walk.find_block(changed=True)
            self._walk.fill(request, row)
            self._fill_left(request, row, at, worth)
            self._walk.pick()

    def _add(self, block: ir.Value, weight: ir.Value) -> None:
        at = self._write.at(self._room.sums, block)
        self._build.store(self._build.fadd(self._build.load(at), weight), at)

    def _fill_left(self, request: Request, row: Row, at: ir.Value, worth: ir.Value) -> None:
        """Into `inner`: the head's weights, less what was drafted."""
        write, build, room = self._write, self._build, self._room
        start = write.times(build.load(self._walk.block), BLOCK)
        with write.counting(number(0), self._walk.heads()) as place:
            token = build.sext(build.load(write.at(room.ids, place)), INT)
            with self._inside(token, start) as to:
                build.store(write.double("exp", build.load(write.at(room.weights, place))), to)
        with self._drafted(request, at) as (token, q), self._inside(token, start) as to:
            left = build.fsub(row.weight(token), build.fmul(q, worth))
            build.store(build.select(build.fcmp_ordered(">", left, ZERO), left, ZERO), to)

    @contextmanager
    def _inside(self, token: ir.Value, start: ir.Value) -> Iterator[ir.Value]:
        """Around what is done where the block from `start` on has the token: its place in `inner`."""
        within = self._build.sub(token, start)
        with self._build.if_then(self._build.icmp_unsigned("<", within, number(BLOCK))):
            yield self._write.at(self._room.inner, within)

    def _number(self, request: Request, at: ir.Value, stream: Stream) -> ir.Value:
        """A uniform of the round's own."""
        position = self._build.add(request.position, at)
        return uniform(self._build, request.seed, request.position, position, stream)
