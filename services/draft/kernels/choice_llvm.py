"""One draft token a row, as code for the processor: bias added, tokens found, noise drawn, one chosen.

Knows rows of numbers. Heads, samplings and what is shipped are `sequential_llvm`'s.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

from llvmlite import ir

from dspark.kernels.noise import Stream
from dspark.kernels.noise_llvm import gumbel, uniform
from dspark.kernels.parts_llvm import DOUBLE, FLOAT, INT, Writer, compile_module, host_lanes, kernel, number

__all__ = ["COUPLED", "GREEDY", "REJECTION", "ChoiceArguments", "compiled"]

GREEDY, COUPLED, REJECTION = range(3)
_WIDEST = 12.0  # of temperatures below the best: what lies lower is hardly ever drawn
_NARROWED, _NARROWINGS = 0.85, 60
_FIELDS = 4  # of a row's integers
_NOTHING = ir.Constant(DOUBLE, float("-inf"))


class ChoiceArguments(ctypes.Structure):
    """Rows of `base` lie `base_stride` numbers apart, those of `bias` (rows, width) `bias_stride`.

    Row r has the integers seed, position, committed length and kind in `rows`, its temperature in `temperatures`, and
    looks at `most` tokens. Out go `logits` (rows, width), `chosen` (rows,) places, `tokens` and `others` (rows,), these
    what a coupled choice would be next, and of the tokens looked at `counts` (rows,), `places` and `weights` (rows,
    most). `d2t` may be 0.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "base", "base_stride", "bias", "bias_stride", "width", "d2t", "rows", "temperatures", "most", "logits",
             "chosen", "tokens", "others", "counts", "places", "weights", "count", "next",
        )
    ]  # fmt: skip


@lru_cache(maxsize=1)
def compiled() -> int:
    """Where the code lies."""
    module = ir.Module("choose")
    _Choice(kernel(module, "choose", host_lanes())).write()
    return compile_module(module, ["choose"]).functions["choose"]


class _Choice:
    """Writes the pass over a row."""

    def __init__(self, write: Writer) -> None:
        self._write, self._build = write, write.build
        self._fields = write.fields(ChoiceArguments)
        self._given = {name: self._build.load(at) for name, at in self._fields.items()}
        self._found = self._build.alloca(INT)  # tokens looked at
        self._bound = self._build.alloca(FLOAT)  # how far below the best they lie at most
        self._open = self._build.alloca(INT)  # whether too many still do
        self._place, self._next = (self._build.alloca(INT) for _ in range(2))
        self._shift = self._build.alloca(INT)  # from a place to the target's id
        self._best, self._behind = (self._build.alloca(DOUBLE) for _ in range(2))
        self._sum = self._build.alloca(DOUBLE)

    def write(self) -> None:
        """The whole function."""
        with self._write.taking(self._fields["next"], number(1), self._given["count"]) as (row, _):
            self._row(row)
        self._build.ret_void()

    def _row(self, row: ir.Value) -> None:
        write, build, given = self._write, self._build, self._given
        logits = write.at(write.floats(given["logits"]), build.mul(row, given["width"]))
        seed, position, committed, kind = (self._integer(row, field) for field in range(_FIELDS))
        temperature = build.load(write.at(write.doubles(given["temperatures"]), row))
        best = self._added(row, logits)
        places = write.at(write.integers(given["places"]), build.mul(row, given["most"]))
        weights = write.at(write.doubles(given["weights"]), build.mul(row, given["most"]))
        drawn = build.icmp_signed("==", kind, number(REJECTION))
        room = write.least(given["most"], given["width"])
        greedy = build.icmp_signed("==", kind, number(GREEDY))
        self._narrow(logits, best, temperature, room, greedy)
        self._collect(logits, best, places, room)
        build.store(build.load(places), self._place)
        build.store(number(-1), self._next)
        with build.if_then(build.not_(greedy)), build.if_else(drawn) as (then, otherwise):
            with then:
                self._draw(logits, best, places, weights, temperature, (seed, committed, position))
            with otherwise:
                self._couple(logits, best, places, temperature, (seed, position))
        place = build.load(self._place)
        build.store(place, write.at(write.integers(given["chosen"]), row))
        build.store(self._token(place), write.at(write.integers(given["tokens"]), row))
        next_ = build.load(self._next)
        other = build.select(build.icmp_signed("<", next_, number(0)), place, next_)
        build.store(self._token(other), write.at(write.integers(given["others"]), row))
        build.store(build.load(self._found), write.at(write.integers(given["counts"]), row))

    def _integer(self, row: ir.Value, field: int) -> ir.Value:
        rows = self._write.integers(self._given["rows"])
        return self._build.load(self._write.at(rows, self._write.times(row, _FIELDS), number(field)))

    def _added(self, row: ir.Value, logits: ir.Value) -> ir.Value:
        """Base and bias into `logits`; the greatest of the sums."""
        write, build, given = self._write, self._build, self._given
        base, bias = (
            write.at(write.floats(given[name]), build.mul(row, given[f"{name}_stride"])) for name in ("base", "bias")
        )

        def add(place: ir.Value, most: list[ir.Value]) -> list[ir.Value]:
            total = build.fadd(write.load(write.at(base, place)), write.load(write.at(bias, place)))
            write.store(total, write.at(logits, place))
            return [write.larger(total, most[0])]

        least = write.constant(float("-inf"))
        found = write.summing(number(0), given["width"], [least], add, step=write.lanes)
        return write.folded(found[0], write.larger)

    def _narrow(
        self, logits: ir.Value, best: ir.Value, temperature: ir.Value, room: ir.Value, greedy: ir.Value
    ) -> None:
        """`_bound`, such that no more tokens lie above than there is room for, if the best are not all alike."""
        write, build = self._write, self._build
        wide = build.fptrunc(build.fmul(temperature, ir.Constant(DOUBLE, _WIDEST)), FLOAT)
        build.store(build.select(greedy, ir.Constant(FLOAT, 0.0), wide), self._bound)
        build.store(build.select(greedy, number(0), number(1)), self._open)
        counted = write.constant(1.0)
        with (
            write.counting(number(0), number(_NARROWINGS)),
            build.if_then(build.icmp_signed("!=", build.load(self._open), number(0))),
        ):
            least = write.broadcast(build.fsub(best, build.load(self._bound)))

            def add(place: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
                above = build.fcmp_ordered(">=", write.load(write.at(logits, place)), least)
                return [build.fadd(total[0], build.select(above, counted, write.zero))]

            found = write.summing(number(0), self._given["width"], [write.zero], add, step=write.lanes)
            few = build.fcmp_ordered("<=", write.folded(found[0], build.fadd), build.sitofp(room, FLOAT))
            with build.if_else(few) as (then, otherwise):
                with then:
                    build.store(number(0), self._open)
                with otherwise:
                    bound = build.fmul(build.load(self._bound), ir.Constant(FLOAT, _NARROWED))
                    build.store(bound, self._bound)

    def _collect(self, logits: ir.Value, best: ir.Value, places: ir.Value, room: ir.Value) -> None:
        """`_found` places of tokens that lie above the bound, the first ones where all of too many do."""
        write, build = self._write, self._build
        build.store(number(0), self._found)
        build.store(number(0), places)
        least = build.fsub(best, build.load(self._bound))
        with write.counting(number(0), self._given["width"]) as place:
            above = build.fcmp_ordered(">=", build.load(write.at(logits, place)), least)
            count = build.load(self._found)
            with build.if_then(build.and_(above, build.icmp_signed("<", count, room))):
                build.store(place, write.at(places, count))
                build.store(build.add(count, number(1)), self._found)

    def _log_weight(self, logits: ir.Value, best: ir.Value, place: ir.Value, temperature: ir.Value) -> ir.Value:
        below = self._build.fsub(self._build.load(self._write.at(logits, place)), best)
        return self._build.fdiv(self._build.fpext(below, DOUBLE), temperature)

    def _couple(
        self, logits: ir.Value, best: ir.Value, places: ir.Value, temperature: ir.Value, key: tuple[ir.Value, ir.Value]
    ) -> None:
        """The token whose log weight and noise are the most, noise being the target's for it, and the one behind it."""
        write, build, (seed, position) = self._write, self._build, key
        for place in (self._best, self._behind):
            build.store(_NOTHING, place)
        with write.counting(number(0), build.load(self._found)) as index:
            place = build.load(write.at(places, index))
            noise = gumbel(write, seed, self._token(place), position, Stream.TOKEN)
            score = build.fadd(self._log_weight(logits, best, place, temperature), noise)
            with build.if_else(build.fcmp_ordered(">", score, build.load(self._best))) as (first, otherwise):
                with first:
                    with build.if_then(build.fcmp_ordered(">", build.load(self._best), _NOTHING)):
                        build.store(build.load(self._place), self._next)
                    build.store(build.load(self._best), self._behind)
                    build.store(score, self._best)
                    build.store(place, self._place)
                with otherwise, build.if_then(build.fcmp_ordered(">", score, build.load(self._behind))):
                    build.store(score, self._behind)
                    build.store(place, self._next)

    def _draw(
        self,
        logits: ir.Value,
        best: ir.Value,
        places: ir.Value,
        weights: ir.Value,
        temperature: ir.Value,
        key: tuple[ir.Value, ir.Value, ir.Value],
    ) -> None:
        """A token by inverse cumulation of its weight among those found; weights go out."""
        write, build, (seed, committed, position) = self._write, self._build, key
        build.store(ir.Constant(DOUBLE, 0.0), self._sum)
        with write.counting(number(0), build.load(self._found)) as index:
            place = build.load(write.at(places, index))
            weight = write.double("exp", self._log_weight(logits, best, place, temperature))
            build.store(weight, write.at(weights, index))
            build.store(build.fadd(build.load(self._sum), weight), self._sum)
        aim = build.fmul(uniform(build, seed, committed, position, Stream.DRAFT), build.load(self._sum))
        build.store(ir.Constant(DOUBLE, 0.0), self._sum)
        with write.counting(number(0), build.load(self._found)) as index:
            before = build.load(self._sum)
            with build.if_then(build.fcmp_ordered("<=", before, aim)):  # the last whose sum before it is not above
                build.store(build.load(write.at(places, index)), self._place)
            build.store(build.fadd(before, build.load(write.at(weights, index))), self._sum)

    def _token(self, place: ir.Value) -> ir.Value:
        """The target's id of a place in the draft vocabulary."""
        build, write = self._build, self._write
        build.store(number(0), self._shift)
        with build.if_then(build.icmp_signed("!=", self._given["d2t"], number(0))):
            build.store(build.load(write.at(write.integers(self._given["d2t"]), place)), self._shift)
        return build.add(place, build.load(self._shift))
