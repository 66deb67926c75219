"""What kernels in LLVM's language are written with: vectors of float32, loops, sums that loops carry, compiling.

A kernel is a `void (Arguments *)` that every thread of a team calls with the same arguments. Threads share its work by
taking numbered tasks from a counter among the arguments, so a disturbed thread leaves its rest to the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import binding, ir

__all__ = [
    "DOUBLE",
    "FLOAT",
    "HALF",
    "INT",
    "INT32",
    "Code",
    "Writer",
    "compile_module",
    "host_has",
    "host_lanes",
    "kernel",
    "number",
]

DOUBLE, FLOAT, INT, INT32, HALF = ir.DoubleType(), ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_EXPONENTS = -87.3, 88.0  # of e; beyond, the result would not be a normal number
_PREFETCH = "llvm.prefetch.p0i8"

_KEPT: list[binding.ExecutionEngine] = []
"""Engines own the code that addresses lead to; none is ever let go."""


@dataclass(frozen=True, slots=True)
class Code:
    """A compiled module: addresses of its functions by name."""

    functions: Mapping[str, int]


@lru_cache(maxsize=1)
def host_lanes() -> int:
    """float32s in a vector: 16 with AVX-512, else 8 (where registers are shorter, a vector takes two)."""
    return 16 if host_has("avx512f") else 8


def host_has(feature: str) -> bool:
    """Whether the processor has what LLVM calls so."""
    return bool(binding.get_host_cpu_features().get(feature))


def compile_module(module: ir.Module, names: Sequence[str]) -> Code:
    """Machine code for this processor.

    Kernels are written as they should run: LLVM's passes unroll their loops, take three to eight times as long and gain
    nothing.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_triple(binding.get_process_triple())
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3)
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _KEPT.append(engine)
    return Code({name: engine.get_function_address(name) for name in names})


def number(value: int) -> ir.Constant:
    """A 64-bit integer."""
    return ir.Constant(INT, value)


def kernel(module: ir.Module, name: str, lanes: int) -> Writer:
    """Begins a kernel: a function of a pointer to its arguments."""
    return Writer(ir.Function(module, ir.FunctionType(ir.VoidType(), [INT.as_pointer()]), name), lanes)


class Writer:
    """Writes one function, in vectors of `lanes` float32s; `build` is where the next instruction goes."""

    def __init__(self, function: ir.Function, lanes: int) -> None:
        self.function, self.lanes = function, lanes
        self.build = ir.IRBuilder(function.append_basic_block())
        self.vector = ir.VectorType(FLOAT, lanes)
        self.zero = ir.Constant(self.vector, None)
        self._words = ir.VectorType(INT32, lanes)

    # ---- arguments and memory

    def fields(self, arguments: type[ctypes.Structure]) -> dict[str, ir.Value]:
        """Pointers to the fields of the function's first argument; all have 64 bits."""
        names = [name for name, *_ in arguments._fields_]
        return {name: self.at(self.function.args[0], number(index)) for index, name in enumerate(names)}

    def floats(self, address: ir.Value) -> ir.Value:
        """A pointer to float32s, from a field."""
        return self.build.inttoptr(address, FLOAT.as_pointer())

    def halves(self, address: ir.Value) -> ir.Value:
        """A pointer to bfloat16s, from a field."""
        return self.build.inttoptr(address, HALF.as_pointer())

    def integers(self, address: ir.Value) -> ir.Value:
        """A pointer to 64-bit integers, from a field."""
        return self.build.inttoptr(address, INT.as_pointer())

    def doubles(self, address: ir.Value) -> ir.Value:
        """A pointer to float64s, from a field."""
        return self.build.inttoptr(address, DOUBLE.as_pointer())

    def rounded(self, field: ir.Value) -> ir.Value:
        """A field that is a float64, as a float32."""
        return self.build.fptrunc(self.build.bitcast(field, DOUBLE), FLOAT)

    def at(self, pointer: ir.Value, *offsets: ir.Value) -> ir.Value:
        """The pointer, moved on by elements."""
        for offset in offsets:
            pointer = self.build.gep(pointer, [offset])
        return pointer

    def load(self, pointer: ir.Value, kind: ir.VectorType | None = None) -> ir.Value:
        """A vector, `vector` by default, from where a float32 may lie."""
        kind = kind or self.vector
        return self.build.load(self.build.bitcast(pointer, kind.as_pointer()), align=4)

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        """A vector, to where a float32 may lie."""
        self.build.store(value, self.build.bitcast(pointer, value.type.as_pointer()), align=4)

    def load_any(self, pointer: ir.Value) -> ir.Value:
        """A vector, from where float32s or bfloat16s lie."""
        if pointer.type.pointee != HALF:
            return self.load(pointer)
        halves = ir.VectorType(HALF, self.lanes)
        bits = self.build.load(self.build.bitcast(pointer, halves.as_pointer()), align=2)
        return self.build.bitcast(self.build.shl(self.build.zext(bits, self._words), self._all(16)), self.vector)

    def store_any(self, value: ir.Value, pointer: ir.Value) -> None:
        """A vector, to where float32s or bfloat16s lie: rounded to the nearest, ties to even; NaN stays one."""
        if pointer.type.pointee != HALF:
            self.store(value, pointer)
            return
        build, bits = self.build, self.build.bitcast(value, self._words)
        odd = build.and_(build.lshr(bits, self._all(16)), self._all(1))
        nearest = build.add(bits, build.add(odd, self._all(0x7FFF)))
        bits = build.select(build.fcmp_unordered("uno", value, value), build.or_(bits, self._all(1 << 22)), nearest)
        halves = build.trunc(build.lshr(bits, self._all(16)), ir.VectorType(HALF, self.lanes))
        build.store(halves, build.bitcast(pointer, halves.type.as_pointer()), align=2)

    def prefetch(self, pointer: ir.Value, ahead: int) -> None:
        """Ask for what lies `ahead` bytes behind a pointer; that may be nobody's.

        Into the second cache: a core waits for far fewer lines at once that are to go into the first.
        """
        module, byte = self.function.module, ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        function = module.globals.get(_PREFETCH) or ir.Function(module, kind, _PREFETCH)
        how = (ir.Constant(INT32, value) for value in (0, 2, 1))  # to read, into all caches but the first, data
        self.build.call(function, [self.at(self.build.bitcast(pointer, byte), number(ahead)), *how])

    def numbered(self, first: ir.Value) -> ir.Value:
        """A vector of int32: an int64 and those that follow it."""
        lanes = ir.Constant(ir.VectorType(INT32, self.lanes), list(range(self.lanes)))
        return self.build.add(self.broadcast(self.build.trunc(first, INT32)), lanes)

    def compress(self, values: ir.Value, wanted: ir.Value, to: ir.Value) -> None:
        """The wanted of a vector of int32, one behind the other."""
        module, name = self.function.module, f"llvm.masked.compressstore.v{self.lanes}i32"
        kind = ir.FunctionType(ir.VoidType(), [values.type, INT32.as_pointer(), wanted.type])
        self.build.call(module.globals.get(name) or ir.Function(module, kind, name), [values, to, wanted])

    def counted(self, wanted: ir.Value) -> ir.Value:
        """How many of a vector's lanes are set, int64."""
        bits = ir.IntType(self.lanes)
        return self.build.zext(self.call(f"ctpop.i{self.lanes}", bits, self.build.bitcast(wanted, bits)), INT)

    def take(self, counter: ir.Value, amount: ir.Value) -> ir.Value:
        """The counter's value before `amount` was added, for one thread only."""
        return self.build.atomic_rmw("add", counter, amount, "monotonic")

    # ---- arithmetic

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        """An integer product."""
        return self.build.mul(value, number(factor))

    def least(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller integer."""
        return self.build.select(self.build.icmp_signed("<", a, b), a, b)

    def most(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The larger integer."""
        return self.build.select(self.build.icmp_signed(">", a, b), a, b)

    def constant(self, value: float) -> ir.Constant:
        """A vector of one number."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def broadcast(self, value: ir.Value) -> ir.Value:
        """A vector of one number."""
        nothing = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.build.insert_element(nothing, value, ir.Constant(INT32, 0))
        return self.build.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(INT32, self.lanes), None))

    def fma(self, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
        """Sum a · b + total, rounded once."""
        return self._call("fma", a, b, total)

    def larger(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Lane by lane."""
        return self.build.select(self.build.fcmp_ordered(">", a, b), a, b)

    def maximum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Lane by lane, NaN where either is; for vectors of any length."""
        build = self.build
        larger = build.select(build.fcmp_ordered(">", a, b), a, b)  # b where it is NaN
        return build.select(build.fcmp_unordered("uno", a, a), a, larger)

    def sqrt(self, x: ir.Value) -> ir.Value:
        """Lane by lane."""
        return self._call("sqrt", x)

    def folded(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """One float32 of a vector: halves are combined until one lane is left."""
        count = self.lanes
        while count > 1:
            count //= 2
            halves = ([first + lane for lane in range(count)] for first in (0, count))
            low, high = (self._lanes(value, picked) for picked in halves)
            value = combine(low, high)
        return self.build.extract_element(value, ir.Constant(INT32, 0))

    def folded_together(
        self, vectors: Sequence[ir.Value], combine: Callable[[ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """One vector of what each of them comes to, the n-th in lane n: neighbours are combined until one lane is left.

        Far fewer steps than one by one; at most as many vectors as there are lanes.
        """
        left = [*vectors, *[vectors[-1]] * (-len(vectors) % (1 << (len(vectors) - 1).bit_length()))]
        for _ in range(self.lanes.bit_length() - 1):
            pairs = list(zip(left[::2], left[1::2], strict=True)) if len(left) > 1 else [(left[0], left[0])]
            left = [combine(*(self._apart(*pair, odd) for odd in (0, 1))) for pair in pairs]
        return left[0]

    def _apart(self, one: ir.Value, other: ir.Value, odd: int) -> ir.Value:
        """Lanes at even or odd places of two vectors."""
        places = ir.Constant(ir.VectorType(INT32, self.lanes), list(range(odd, 2 * self.lanes, 2)))
        return self.build.shuffle_vector(one, other, places)

    def exp(self, x: ir.Value) -> ir.Value:
        """Power of e, within two units in the last place (Cephes' polynomial), for x cut to -87.3 … 88."""
        x = self.larger(x, self.constant(_EXPONENTS[0]))
        x = self.build.select(
            self.build.fcmp_ordered("<", x, self.constant(_EXPONENTS[1])), x, self.constant(_EXPONENTS[1])
        )
        whole = self._call("floor", self.fma(x, self.constant(_LOG2_E), self.constant(0.5)))
        rest = self.fma(whole, self.constant(-_LN2_LOW), self.fma(whole, self.constant(-_LN2_HIGH), x))
        series = self.constant(_EXP[0])
        for coefficient in _EXP[1:]:
            series = self.fma(series, rest, self.constant(coefficient))
        series = self.fma(self.build.fmul(rest, rest), series, self.build.fadd(rest, self.constant(1.0)))
        integers = ir.VectorType(INT32, self.lanes)
        exponent = self.build.add(self.build.fptosi(whole, integers), ir.Constant(integers, [127] * self.lanes))
        exponent = self.build.shl(exponent, ir.Constant(integers, [23] * self.lanes))
        return self.build.fmul(series, self.build.bitcast(exponent, self.vector))

    def double(self, name: str, value: ir.Value) -> ir.Value:
        """A function of one float64: `exp`, `log`."""
        module, full = self.function.module, f"llvm.{name}.f64"
        kind = ir.FunctionType(DOUBLE, [DOUBLE])
        return self.build.call(module.globals.get(full) or ir.Function(module, kind, full), [value])

    def call(self, name: str, kind: ir.Type, *arguments: ir.Value) -> ir.Value:
        """What LLVM has under a name, giving a `kind`."""
        module, full = self.function.module, f"llvm.{name}"
        whole = ir.FunctionType(kind, [argument.type for argument in arguments])
        return self.build.call(module.globals.get(full) or ir.Function(module, whole, full), arguments)

    def _all(self, value: int) -> ir.Constant:
        return ir.Constant(self._words, [value] * self.lanes)

    def _call(self, name: str, *arguments: ir.Value) -> ir.Value:
        return self.call(f"{name}.v{self.lanes}f32", self.vector, *arguments)

    def _lanes(self, value: ir.Value, picked: Sequence[int]) -> ir.Value:
        return self.build.shuffle_vector(value, value, ir.Constant(ir.VectorType(INT32, len(picked)), list(picked)))

    # ---- flow

    @contextmanager
    def counting(self, start: ir.Value, end: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """A loop: the counter, around what is repeated."""
        with self._loop() as (before, body):
            counter = self.build.phi(INT)
            counter.add_incoming(start, before)
            with body(self.build.icmp_signed("<", counter, end)):
                yield counter
                counter.add_incoming(self.build.add(counter, number(step)), self.build.block)

    def summing(
        self,
        start: ir.Value,
        end: ir.Value,
        sums: Sequence[ir.Value],
        add: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
        step: int = 1,
    ) -> list[ir.Value]:
        """Values that a loop carries: `sums` at first, `add(counter, sums)` after each turn."""
        with self._loop() as (before, body):
            counter, *carried = (self.build.phi(value.type) for value in (start, *sums))
            for phi, value in zip((counter, *carried), (start, *sums), strict=True):
                phi.add_incoming(value, before)
            with body(self.build.icmp_signed("<", counter, end)):
                added = add(counter, list(carried))
                following = self.build.add(counter, number(step))
                for phi, value in zip((counter, *carried), (following, *added), strict=True):
                    phi.add_incoming(value, self.build.block)
        return carried

    @contextmanager
    def taking(self, counter: ir.Value, share: ir.Value, end: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over shares of the tasks 0 … end - 1 that no other thread has: first task and end of a share."""
        with self._loop() as (_, body):
            first = self.take(counter, share)
            with body(self.build.icmp_signed("<", first, end)):
                yield first, self.least(self.build.add(first, share), end)

    @contextmanager
    def while_set(self, flag: ir.Value) -> Iterator[None]:
        """A loop that goes on while the integer at a pointer is not 0."""
        head = self.function.append_basic_block()
        self.build.branch(head)
        self.build.position_at_end(head)
        block, after = self.function.append_basic_block(), self.function.append_basic_block()
        self.build.cbranch(self.build.icmp_signed("!=", self.build.load(flag), number(0)), block, after)
        self.build.position_at_end(block)
        yield
        self.build.branch(head)
        self.build.position_at_end(after)

    def cases(self, value: ir.Value, cases: range, write: Callable[[int], None]) -> None:
        """`write(case)` runs where `value` is that case."""
        after = self.function.append_basic_block()
        switch = self.build.switch(value, after)
        for case in cases:
            block = self.function.append_basic_block()
            switch.add_case(number(case), block)
            self.build.position_at_end(block)
            write(case)
            self.build.branch(after)
        self.build.position_at_end(after)

    @contextmanager
    def _loop(self) -> Iterator[tuple[ir.Block, Callable[[ir.Value], AbstractContextManager[None]]]]:
        """The block before, and what goes around the body, given whether there is another turn."""
        before, head = self.build.block, self.function.append_basic_block()
        self.build.branch(head)
        self.build.position_at_end(head)

        @contextmanager
        def body(another: ir.Value) -> Iterator[None]:
            block, after = self.function.append_basic_block(), self.function.append_basic_block()
            self.build.cbranch(another, block, after)
            self.build.position_at_end(block)
            yield
            self.build.branch(head)
            self.build.position_at_end(after)

        yield before, body
