"""Logits as numbers, in code for the processor at hand: how they lie, their order as integers, their weights.

Knows vectors of them. What a row of them comes to is `law_llvm`'s affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from dspark.kernels.logits import MAX_SCALE
from dspark.kernels.parts_llvm import DOUBLE, FLOAT, INT, INT32, Writer, number

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "Element",
    "Weighing",
    "end_keys",
    "finite",
    "function",
    "log_weight",
    "nth",
    "ordered",
    "unordered",
]

_SHORT = ir.IntType(16)
_SIGN, _MAGNITUDE = -(1 << 31), (1 << 31) - 1
_LEAST = -73.0  # as in `dspark.kernels.logits_llvm`: a smaller power of e weighs nothing


def function(module: ir.Module, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    """A function of a module's own."""
    made = ir.Function(module, ir.FunctionType(result, arguments), name)
    made.linkage = "internal"
    return made


@dataclass(frozen=True, slots=True)
class Element:
    """How logits lie in memory: float32, or bfloat16 in 16 bits."""

    name: str
    stored: ir.Type

    def load(self, write: Writer, at: ir.Value) -> ir.Value:
        """A vector of float32."""
        if self.stored is FLOAT:
            return write.load(at)
        halves = ir.VectorType(_SHORT, write.lanes)
        wide = ir.VectorType(INT32, write.lanes)
        found = write.build.load(write.build.bitcast(at, halves.as_pointer()), align=2)
        bits = write.build.shl(write.build.zext(found, wide), ir.Constant(wide, [16] * write.lanes))
        return write.build.bitcast(bits, write.vector)

    def one(self, write: Writer, at: ir.Value) -> ir.Value:
        """One float32."""
        build, found = write.build, write.build.load(at)
        if self.stored is FLOAT:
            return found
        return build.bitcast(build.shl(build.zext(found, INT32), ir.Constant(INT32, 16)), FLOAT)


FLOAT32, BFLOAT16 = Element("float32", FLOAT), Element("bfloat16", _SHORT)


def finite(build: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Whether a float32 is neither infinite nor no number."""
    bits = build.and_(build.bitcast(value, INT32), ir.Constant(INT32, _MAGNITUDE))
    return build.fcmp_ordered("<", build.bitcast(bits, FLOAT), ir.Constant(FLOAT, float("inf")))


def ordered(write: Writer, value: ir.Value) -> ir.Value:
    """int32 in the order of float32, one or a vector; -0.0 equals 0.0."""
    build, vector = write.build, isinstance(value.type, ir.VectorType)
    kind = ir.VectorType(INT32, write.lanes) if vector else INT32

    def constant(number_: int) -> ir.Constant:
        return ir.Constant(kind, [number_] * write.lanes if vector else number_)

    bits = build.bitcast(build.fadd(value, write.zero if vector else ir.Constant(FLOAT, 0.0)), kind)
    return build.xor(build.and_(build.ashr(bits, constant(31)), constant(_MAGNITUDE)), bits)


def unordered(write: Writer, key: ir.Value) -> ir.Value:
    """The float32 of a key, or a vector of them."""
    build, vector = write.build, isinstance(key.type, ir.VectorType)

    def constant(number_: int) -> ir.Constant:
        return ir.Constant(key.type, [number_] * write.lanes if vector else number_)

    sign = build.and_(build.ashr(key, constant(31)), constant(_MAGNITUDE))
    return build.bitcast(build.xor(sign, key), write.vector if vector else FLOAT)


def nth(module: ir.Module, lanes: int) -> ir.Function:
    """A function (keys, count, n): the n-th greatest of `count` keys, the least there is where there are fewer."""
    made = function(module, "nth", INT32, [INT32.as_pointer(), INT, INT])
    write = Writer(made, lanes)
    keys, count, n = made.args
    build, vector = write.build, ir.VectorType(INT32, lanes)
    nothing, sign = ir.Constant(vector, None), ir.Constant(INT32, _SIGN)

    def bit(index: ir.Value, found: list[ir.Value]) -> list[ir.Value]:
        shift = build.trunc(build.sub(number(31), index), INT32)
        tried = build.or_(found[0], build.shl(ir.Constant(INT32, 1), shift))
        least = write.broadcast(build.xor(tried, sign))

        def add(place: ir.Value, total: list[ir.Value]) -> list[ir.Value]:
            at_least = build.icmp_signed(">=", write.load(write.at(keys, place), vector), least)
            return [build.sub(total[0], build.sext(at_least, vector))]

        total = write.summing(number(0), count, [nothing], add, step=lanes)[0]
        enough = build.icmp_signed(">=", build.sext(write.folded(total, build.add), INT), n)
        return [build.select(enough, tried, found[0])]

    found = write.summing(number(0), number(32), [ir.Constant(INT32, 0)], bit)
    build.ret(build.xor(found[0], sign))
    return made


def end_keys(write: Writer, keys: ir.Value, count: ir.Value) -> None:
    """A vector of the least keys behind the last, so that they may be counted by vectors."""
    for lane in range(write.lanes):
        write.build.store(ir.Constant(INT32, _SIGN), write.at(keys, count, number(lane)))


def log_weight(build: ir.IRBuilder, value: ir.Value, greatest: ir.Value, temperature: ir.Value) -> ir.Value:
    """Log weight, float64, of a float32."""
    return build.fdiv(build.fsub(build.fpext(value, DOUBLE), greatest), temperature)


class Weighing:
    """Float32 weights of vectors of logits, as `dspark.kernels.logits.weigh` makes them; what is alike is made once."""

    def __init__(self, write: Writer, greatest: ir.Value, temperature: ir.Value) -> None:
        self._write, build = write, write.build
        scale = build.fdiv(ir.Constant(DOUBLE, 1.0), temperature)
        low, high = (ir.Constant(DOUBLE, bound) for bound in (1 / MAX_SCALE, MAX_SCALE))
        scale = build.select(build.fcmp_ordered("<", scale, low), low, scale)
        scale = build.select(build.fcmp_ordered(">", scale, high), high, scale)
        self._scale = write.broadcast(build.fptrunc(scale, FLOAT))
        self._greatest = write.broadcast(build.fptrunc(greatest, FLOAT))

    def of(self, values: ir.Value) -> ir.Value:
        """Weights of a vector."""
        write, build = self._write, self._write.build
        exponent = build.fmul(build.fsub(values, self._greatest), self._scale)
        counts = build.fcmp_ordered(">=", exponent, write.constant(_LEAST))
        return build.select(counts, write.exp(exponent), write.zero)
