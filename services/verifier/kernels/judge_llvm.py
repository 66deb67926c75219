"""Which drafts stand and what follows them, for many requests, as code for the processor at hand.

A task is a request; its rows are judged in order and only as far as a token behind them may stand. The rules are those
of `services.verifier.verification`; of blocks by rejection `trial_llvm` has them, of rows that hold bounds `race_llvm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.logits import BLOCK
from dspark.kernels.parts_llvm import INT, Writer, compile_module, host_has, host_lanes, kernel, number
from services.verifier.kernels.law_llvm import Law, declare
from services.verifier.kernels.numbers_llvm import BFLOAT16, FLOAT32, Element, finite, ordered
from services.verifier.kernels.race_llvm import RaceWalk
from services.verifier.kernels.trial_llvm import TrialWalk
from services.verifier.kernels.walk_llvm import FIELDS, Request, Walk

__all__ = ["BOUNDED_COUPLED", "BOUNDED_GREEDY", "COUPLED", "GREEDY", "REJECTION", "compiled"]

GREEDY, COUPLED, REJECTION, BOUNDED_GREEDY, BOUNDED_COUPLED = range(5)
_OUT = 3  # accepted, token, whether the logits were sound


@lru_cache(maxsize=2)
def compiled(*, narrow: bool) -> int:
    """Where the code lies, for logits in float32 or, `narrow`, bfloat16; a third of a second, once."""
    module, element = ir.Module("judge"), BFLOAT16 if narrow else FLOAT32
    law = declare(module, host_lanes(), element)
    _Judging(kernel(module, "judge", host_lanes()), element, law).write()
    return compile_module(module, ["judge"]).functions["judge"]


class _Judging:
    """Writes the whole function."""

    def __init__(self, write: Writer, element: Element, law: Law) -> None:
        self._write, self._build, self._element = write, write.build, element
        self._walk = Walk(write, element, law)
        trial = TrialWalk(self._walk)
        self._walks: dict[int, Callable[[Request], None]] = {
            GREEDY: self._greedy,
            COUPLED: self._coupled,
            REJECTION: trial.follow,
        }
        if element is FLOAT32 and host_has("avx512bf16"):
            self._race = RaceWalk(self._walk)
            self._walks |= {BOUNDED_GREEDY: self._bounded_greedy, BOUNDED_COUPLED: self._bounded_coupled}

    def write(self) -> None:
        """Task by task."""
        write, build = self._write, self._build
        with write.taking(self._walk.fields["next"], number(1), self._walk.given["tasks"]) as (task, _):
            request = self._request(task)
            self._walk.begin()
            for kind, walk in self._walks.items():
                with build.if_then(build.icmp_signed("==", request.kind, number(kind))):
                    walk(request)
            out = write.at(write.integers(self._walk.given["out"]), write.times(task, _OUT))
            for index, value in enumerate((self._walk.at, self._walk.token, self._walk.sound)):
                build.store(build.load(value), write.at(out, number(index)))
        build.ret_void()

    def _request(self, task: ir.Value) -> Request:
        write, build = self._write, self._build
        fields = write.at(write.integers(self._walk.given["requests"]), write.times(task, len(FIELDS)))
        integers = {name: build.load(write.at(fields, number(index))) for index, name in enumerate(FIELDS)}
        temperatures = write.doubles(self._walk.given["temperatures"])
        return Request(**integers, temperature=build.load(write.at(temperatures, task)))

    def _greedy(self, request: Request) -> None:
        """The greatest logit's token, the lowest of equal ones, row by row."""
        self._along(request, self._greatest)

    def _coupled(self, request: Request) -> None:
        """The target's own choice, row by row."""
        self._along(request, self._chosen)

    def _bounded_greedy(self, request: Request) -> None:
        """As `_greedy`, of rows that hold bounds."""
        self._along(request, self._overtaken)

    def _bounded_coupled(self, request: Request) -> None:
        """As `_coupled`, of rows that hold bounds."""
        self._along(request, self._raced)

    def _along(self, request: Request, choose: Callable[[Request, ir.Value], None]) -> None:
        """Chooses at one row after another for as long as the choice is the draft token there."""
        write, build, walk = self._write, self._build, self._walk
        build.store(number(1), walk.going)
        with write.counting(number(0), build.add(request.count, number(1))), build.if_then(walk.is_set(walk.going)):
            at = build.load(walk.at)
            choose(request, at)
            build.store(number(0), walk.going)
            further = build.and_(build.icmp_signed("<", at, request.count), walk.is_set(walk.sound))
            with build.if_then(further):
                same = build.zext(build.icmp_signed("==", build.load(walk.token), walk.draft(request, at)), INT)
                build.store(same, walk.going)
                build.store(build.add(at, same), walk.at)

    def _chosen(self, request: Request, at: ir.Value) -> None:
        with self._walk.measured(request, at) as row:
            self._walk.choose(request, row)

    def _raced(self, request: Request, at: ir.Value) -> None:
        with self._walk.measured(request, at) as row:
            self._race.choose(request, row)

    def _overtaken(self, request: Request, at: ir.Value) -> None:
        self._greatest(request, at)
        with self._build.if_then(self._walk.is_set(self._walk.sound)):
            self._race.overtake(request, at)

    def _greatest(self, request: Request, at: ir.Value) -> None:
        """The first token of the greatest logit."""
        write, build, walk = self._write, self._build, self._walk
        x = walk.row(request, at)
        known = x, walk.tops(request, at), walk.given["blocks"]
        greatest = build.call(walk.law.peaks, [*known, *walk.room.pointers()])
        build.store(build.zext(finite(build, greatest), INT), walk.sound)
        build.store(number(-1), walk.token)
        with write.counting(number(0), walk.given["blocks"]) as block, build.if_then(walk.is_unset(walk.token)):
            key = build.load(write.at(walk.room.peaks, block))
            with build.if_then(build.icmp_signed("==", key, ordered(write, greatest))):
                self._first(x, write.times(block, BLOCK), greatest)

    def _first(self, x: ir.Value, start: ir.Value, greatest: ir.Value) -> None:
        write, build, walk = self._write, self._build, self._walk
        with write.counting(start, build.add(start, number(BLOCK))) as token:
            equal = build.fcmp_ordered("==", self._element.one(write, write.at(x, token)), greatest)
            with build.if_then(build.and_(equal, walk.is_unset(walk.token))):
                build.store(token, walk.token)
