"""The product of rows with a weight in panels, written in LLVM's language and compiled for the processor at hand.

A weight (out, in) lies as groups of `GROUP` panels. A panel holds, input by input, the weights of 2 · lanes outputs: a
vector of them times one broadcast number of a row is added to that row's sums. So every sum runs through the inputs in
order, one fused multiply-add each, whatever the shape of the tile around it: a row's bits depend on nothing else in the
batch. Two bfloat16 weights share 32 bits; widening them is a shift for the one and a mask for the other.

Knows registers and loops. How weights are packed, and the threads that run this, are `linear_llvm`'s and `team`'s.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from llvmlite import binding, ir

__all__ = ["GROUP", "NARROW", "WIDE", "ProductArguments", "Program", "Tiling", "compiled"]

GROUP = 4
"""Panels that are handed out together."""

_FLOAT, _INT = ir.FloatType(), ir.IntType(64)
_NONE = ir.VoidType()


class ProductArguments(ctypes.Structure):
    """What the compiled product reads. All are of 64 bits; the program indexes them by their order here.

    `x` (rows, inputs) float32, `weight` in panels, `out` (rows, outputs) float32, `groups` of panels, `share` groups
    that a thread takes at a time, `next` the first group that nobody has taken: 0 at the start.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("x", "weight", "out", "rows", "inputs", "outputs", "groups", "share", "next")
    ]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Numbers in a vector, and panels at once for a tile of 1, 2, … rows: as many sums as the registers hold."""

    lanes: int
    panels: tuple[int, ...]

    @property
    def group_outputs(self) -> int:
        """Outputs of a group of panels."""
        return GROUP * 2 * self.lanes


WIDE = Tiling(16, (4, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1))  # AVX-512: 32 registers of 16
NARROW = Tiling(8, (4, 2, 1, 1, 1, 1))  # AVX2: 16 registers of 8; Arm: 32 of 4


@dataclass(frozen=True, slots=True)
class Program:
    """Compiled products over bfloat16 and float32 weights.

    Both are addresses of a `void (ProductArguments *)` that every thread of a team calls with the same arguments.
    """

    lanes: int  # numbers in a vector; a panel has twice as many outputs
    bfloat16: int
    float32: int
    engine: binding.ExecutionEngine  # owns the code


@lru_cache(maxsize=2)
def compiled(tiling: Tiling | None = None) -> Program:
    """The program of this processor, or of another tiling; an eighth of a second, once.

    What is written below is as it should run: LLVM's passes unroll its loops, take three to eight times as long and
    gain nothing.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    tiling = tiling or (WIDE if features.get("avx512f") else NARROW)
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )
    module = binding.parse_assembly(source(tiling))
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    narrow, wide = (engine.get_function_address(name) for name in ("product_bfloat16", "product_float32"))
    return Program(tiling.lanes, narrow, wide, engine)


def source(tiling: Tiling) -> str:
    """The program as LLVM's text."""
    module = ir.Module("dspark")
    module.triple = binding.get_default_triple()
    for element in (_Bfloat16(tiling.lanes), _Float32(tiling.lanes)):
        _Product(module, tiling, element).write()
    return str(module)


class _Bfloat16:
    """Outputs n and n + lanes of a panel in the lower and upper half of 32 bits."""

    name = "bfloat16"
    vectors = 1  # that a panel has for an input

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(ir.IntType(32), lanes)
        self._values = ir.VectorType(_FLOAT, lanes)

    def load(self, build: ir.IRBuilder, at: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both halves of the panel's outputs, widened."""
        pair = _load(build, at)
        low = build.shl(pair, ir.Constant(self.stored, [16] * self.stored.count))
        high = build.and_(pair, ir.Constant(self.stored, [0xFFFF0000] * self.stored.count))
        return build.bitcast(low, self._values), build.bitcast(high, self._values)


class _Float32:
    """Outputs n to n + lanes of a panel, then the other half."""

    name = "float32"
    vectors = 2

    def __init__(self, lanes: int) -> None:
        self.stored = ir.VectorType(_FLOAT, lanes)

    def load(self, build: ir.IRBuilder, at: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both halves of the panel's outputs."""
        return _load(build, at), _load(build, build.gep(at, [_number(1)]))


class _Product:
    """Writes one product: a function for every tile, and the loops over groups and rows around them."""

    def __init__(self, module: ir.Module, tiling: Tiling, element: _Bfloat16 | _Float32) -> None:
        self._module, self._tiling, self._element = module, tiling, element
        self._values = ir.VectorType(_FLOAT, tiling.lanes)
        name = f"llvm.fma.v{tiling.lanes}f32"
        kind = ir.FunctionType(self._values, [self._values] * 3)
        self._fma = module.globals.get(name) or ir.Function(module, kind, name)

    def write(self) -> None:
        """`product_<element>`, with its tiles, into the module."""
        tiles = {rows: self._tile(rows, panels) for rows, panels in enumerate(self._tiling.panels, 1)}
        kind = ir.FunctionType(_NONE, [_INT.as_pointer()])
        function = ir.Function(self._module, kind, f"product_{self._element.name}")
        build = ir.IRBuilder(function.append_basic_block())
        fields = [name for name, _ in ProductArguments._fields_]
        at = {name: build.gep(function.args[0], [_number(index)]) for index, name in enumerate(fields)}
        given = {name: build.load(at[name]) for name in fields[:-1]}
        shares = _Loop(build, function)
        first = build.atomic_rmw("add", at["next"], given["share"], "monotonic")
        with shares.while_(build.icmp_signed("<", first, given["groups"])):
            end = _least(build, build.add(first, given["share"]), given["groups"])
            with _counting(build, function, first, end, 1) as group:
                self._group(build, function, given, group, tiles)
        build.ret_void()

    def _group(
        self, build: ir.IRBuilder, function: ir.Function, given: Mapping[str, ir.Value], group: ir.Value,
        tiles: Mapping[int, ir.Function],
    ) -> None:  # fmt: skip
        """All rows of one group's outputs: full tiles, then one of the rows that are left."""
        inputs, outputs, rows = given["inputs"], given["outputs"], given["rows"]
        panel = build.mul(inputs, _number(self._element.vectors))
        weight = build.inttoptr(given["weight"], self._element.stored.as_pointer())
        weight = build.gep(weight, [build.mul(group, build.mul(panel, _number(GROUP)))])
        x, out = (build.inttoptr(given[name], _FLOAT.as_pointer()) for name in ("x", "out"))
        out = build.gep(out, [build.mul(group, _number(self._tiling.group_outputs))])

        def tile(size: int, row: ir.Value) -> None:
            at = build.gep(x, [build.mul(row, inputs)])
            for first in range(0, GROUP, self._tiling.panels[size - 1]):
                to = build.gep(out, [build.add(build.mul(row, outputs), _number(first * 2 * self._tiling.lanes))])
                build.call(
                    tiles[size], [at, build.gep(weight, [build.mul(panel, _number(first))]), to, inputs, outputs]
                )

        most = len(self._tiling.panels)
        full = build.sub(rows, build.srem(rows, _number(most)))
        with _counting(build, function, _number(0), full, most) as row:
            tile(most, row)
        with _cases(build, function, build.sub(rows, full), range(1, most)) as cases:
            for size in cases:
                tile(size, full)

    def _tile(self, rows: int, panels: int) -> ir.Function:
        """tile(x, weight, out, inputs, outputs): `rows` rows times `panels` panels, all sums in registers."""
        at = _FLOAT.as_pointer()
        kind = ir.FunctionType(_NONE, [at, self._element.stored.as_pointer(), at, _INT, _INT])
        function = ir.Function(self._module, kind, f"tile_{self._element.name}_{rows}_{panels}")
        function.linkage = "internal"
        x, weight, out, inputs, outputs = function.args
        build = ir.IRBuilder(function.append_basic_block())
        x_rows = [build.gep(x, [build.mul(inputs, _number(row))]) for row in range(rows)]
        stride = build.mul(inputs, _number(self._element.vectors))
        starts = [build.gep(weight, [build.mul(stride, _number(panel))]) for panel in range(panels)]

        def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            index = build.mul(k, _number(self._element.vectors))
            halves = [half for start in starts for half in self._element.load(build, build.gep(start, [index]))]
            numbers = [self._broadcast(build, build.load(build.gep(row, [k]))) for row in x_rows]
            pairs = ((number, half) for number in numbers for half in halves)
            return [build.call(self._fma, [*pair, total]) for pair, total in zip(pairs, sums, strict=True)]

        sums = _summing(build, function, inputs, [ir.Constant(self._values, None)] * (rows * panels * 2), add)
        for index, total in enumerate(sums):
            row, half = divmod(index, panels * 2)
            to = build.gep(out, [build.add(build.mul(outputs, _number(row)), _number(half * self._tiling.lanes))])
            build.store(total, build.bitcast(to, self._values.as_pointer()), align=4)
        build.ret_void()
        return function

    def _broadcast(self, build: ir.IRBuilder, number: ir.Value) -> ir.Value:
        nothing = ir.Constant(self._values, ir.Undefined)
        first = build.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self._tiling.lanes), None)
        return build.shuffle_vector(first, nothing, zeros)


# ---- what LLVM's language spells out


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _load(build: ir.IRBuilder, at: ir.Value) -> ir.Value:
    return build.load(at, align=4)  # packed weights come from torch, which aligns to 64; a mapped one might not be


def _least(build: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return build.select(build.icmp_signed("<", a, b), a, b)


class _Loop:
    """A block to come back to; what is written from here on runs every time."""

    def __init__(self, build: ir.IRBuilder, function: ir.Function) -> None:
        self._build, self._function = build, function
        self.before, self.head = build.block, function.append_basic_block()
        build.branch(self.head)
        build.position_at_end(self.head)

    @contextmanager
    def while_(self, condition: ir.Value) -> Iterator[None]:
        """Around the loop's body; leaves the builder behind the loop."""
        body, after = self._function.append_basic_block(), self._function.append_basic_block()
        self._build.cbranch(condition, body, after)
        self._build.position_at_end(body)
        yield
        self._build.branch(self.head)
        self._build.position_at_end(after)


@contextmanager
def _counting(
    build: ir.IRBuilder, function: ir.Function, start: ir.Value, end: ir.Value, step: int
) -> Iterator[ir.Value]:
    """A loop's counter, around its body."""
    loop = _Loop(build, function)
    counter = build.phi(_INT)
    counter.add_incoming(start, loop.before)
    with loop.while_(build.icmp_signed("<", counter, end)):
        yield counter
        counter.add_incoming(build.add(counter, _number(step)), build.block)


def _summing(
    build: ir.IRBuilder, function: ir.Function, end: ir.Value, zeros: list[ir.Value],
    add: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:  # fmt: skip
    """Sums after `add(k, sums)` for k from 0 up to `end`."""
    loop = _Loop(build, function)
    counter = build.phi(_INT)
    counter.add_incoming(_number(0), loop.before)
    sums = [build.phi(zero.type) for zero in zeros]
    with loop.while_(build.icmp_signed("<", counter, end)):
        added = add(counter, sums)
        counter.add_incoming(build.add(counter, _number(1)), build.block)
        for total, zero, new in zip(sums, zeros, added, strict=True):
            total.add_incoming(zero, loop.before)
            total.add_incoming(new, build.block)
    return sums


@contextmanager
def _cases(build: ir.IRBuilder, function: ir.Function, value: ir.Value, cases: range) -> Iterator[Iterator[int]]:
    """Each of `cases` in turn; what is written while one is at hand runs where `value` is that number."""
    after = function.append_basic_block()
    switch = build.switch(value, after)

    def each() -> Iterator[int]:
        for case in cases:
            block = function.append_basic_block()
            switch.add_case(_number(case), block)
            build.position_at_end(block)
            yield case
            build.branch(after)

    yield each()
    build.position_at_end(after)
