"""Layers of few rows as one program: their kernels run one after another in one parallel region, no Python between.

The first time, layers run on so many rows as written, on memory of their own, and every compiled kernel is noted with
its arguments. From then on new inputs are copied to where the first lay, and a loop in machine code calls the same
functions with the same arguments, each thread waiting for the others after each. Results keep their bits: it is the
same code over the same tasks.

A one-token step of Gemma 3 270M has some 160 kernels, most of them shorter than what calls them.

What is no compiled kernel cannot be noted: where layers do anything else, they run as written for ever. All programs
use the same memory, as only one runs at a time, and a program what its tensors leave for the next of their size.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspark.kernels import team
from dspark.kernels.attention_llvm import RowPlan
from dspark.kernels.parts_llvm import INT, compile_module, kernel, number
from dspark.kernels.repeated import Layers

__all__ = ["Programs"]

MOST_ROWS = 64  # more take so long that Python's share is small
MOST_BYTES = 32 << 20  # of what layers write; taken as it is used
MOST_PROGRAMS = 512  # of some 30 KB each
_ALIGNED = 64
_PAGES = 9  # of a kind's inputs
_TILES = range(5, 8)  # what has an entry a tile
_COPIES = range(10, 12)  # what has an entry a copy, where there are any
_LOOSE_COPIES = 128
_LOOSE = 256  # pages; what grows with the context has room for a power of two of them at least
_LOOSE_ROOM = 1024  # positions, for scores
_APART = 32  # more of them, so that rows of scores do not meet in the same places of a cache

_NEW: dict[Any, Callable[..., Sequence[int]]] = {
    torch.ops.aten.empty.memory_format: lambda size, **_: size,
    torch.ops.aten.new_empty.default: lambda _like, size, **_: size,
    torch.ops.aten.empty_like.default: lambda like, **_: like.shape,
}


class Programs:
    """Implements `dspark.kernels.repeated.Repeated`."""

    remembers = True

    def __init__(self) -> None:
        self._programs: OrderedDict[Hashable, _Program | None] = OrderedDict()
        self._memory = _Memory()

    def __call__(self, layers: Layers, x: Tensor, steps: Mapping[str, Any], key: Hashable) -> Sequence[Tensor]:
        """As `Repeated`."""
        if len(x) > MOST_ROWS or not all(isinstance(step.plan, RowPlan) for step in steps.values()):
            return layers(x, steps)
        inputs = _inputs(x, steps)
        kinds = (tensor.dtype for tensor in inputs)
        form = (key, torch.get_num_threads(), *_shapes(inputs, len(steps)), *kinds, *map(_room, steps.values()))
        if form not in self._programs:
            return self._record(layers, inputs, steps, form)
        self._programs.move_to_end(form)
        program = self._programs[form]
        return layers(x, steps) if program is None else program.run(inputs)

    def _record(
        self, layers: Layers, inputs: Sequence[Tensor], steps: Mapping[str, Any], form: Hashable
    ) -> Sequence[Tensor]:
        """Run the layers where a program is to run, and keep it if all they do can be noted."""
        own = self._memory.begin(inputs, _shapes(inputs, len(steps)))
        rooms = {kind: self._memory.take(_room(step), torch.float32) for kind, step in steps.items()}
        x, placed = _placed(own, steps, rooms)
        with team.noting() as calls, self._memory:
            outputs = layers(x, placed)
        self._programs[form] = None if self._memory.strayed else _Program(own, calls, outputs)
        while len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return [output.clone() for output in outputs]


class _Program:
    """Kernels to run in turn. Its inputs' and outputs' memory is every program's."""

    def __init__(self, inputs: Sequence[Tensor], calls: Sequence[tuple[int, bytes]], outputs: Sequence[Tensor]) -> None:
        self._outputs = outputs
        self._inputs = [tensor.data_ptr() for tensor in inputs]  # in the memory that the outputs keep alive
        self._pristine = b"".join(arguments for _, arguments in calls)  # kernels count in them
        self._arguments = ctypes.create_string_buffer(self._pristine, len(self._pristine))
        entries, at = [], ctypes.addressof(self._arguments)
        for function, arguments in calls:
            entries += [function, at]
            at += len(arguments)
        self._entries = (ctypes.c_int64 * len(entries))(*entries)
        self._whole = _RunArguments(ctypes.addressof(self._entries), len(calls), team.barrier())

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for own, new in zip(self._inputs, inputs, strict=True):
            whole = new.contiguous()
            ctypes.memmove(own, whole.data_ptr(), whole.nbytes)  # a tenth of what `copy_` takes
        ctypes.memmove(self._arguments, self._pristine, len(self._pristine))
        team.run(_compiled(), self._whole)
        return [output.clone() for output in self._outputs]


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where programs' tensors lie, from the start for each program; inside `with` all new ones do.

    `strayed`: something was computed by other than compiled kernels, or there was no room.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes = np.empty(0, np.uint8)
        self._used = self._program = 0
        self._left: dict[int, list[int]] = {}  # by size, where tensors lay that are gone
        self.strayed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch asks; True would have it import its compiler, for a second or more, as the first program is noted."""
        return False

    def begin(self, inputs: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """A new program: copies of its inputs, in tensors of these shapes, some with room to grow."""
        if not len(self._bytes):
            room = np.empty(MOST_BYTES + _ALIGNED, np.uint8)
            self._bytes = room[-room.ctypes.data % _ALIGNED :][:MOST_BYTES]
        self._program += 1
        self._used, self._left, self.strayed = 0, {}, False
        own = [self.take(shape, tensor.dtype) for shape, tensor in zip(shapes, inputs, strict=True)]
        for new, tensor in zip(own, inputs, strict=True):
            new[: len(tensor)].copy_(tensor)
        return own

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor whose place is free again once nothing refers to it, or to a view of it."""
        needed = math.prod(shape) * dtype.itemsize
        size = max(1, -(-needed // _ALIGNED)) * _ALIGNED
        at = left.pop() if (left := self._left.get(size)) else self._behind(size)
        if at is None:
            return torch.empty(tuple(shape), dtype=dtype)
        place = self._bytes[at : at + size]
        weakref.finalize(place, self._gone, self._program, size, at).atexit = False
        return torch.from_numpy(place)[:needed].view(dtype).view(tuple(shape))

    def _behind(self, size: int) -> int | None:
        if self._used + size > len(self._bytes):
            self.strayed = True
            return None
        at, self._used = self._used, self._used + size
        return at

    def _gone(self, program: int, size: int, at: int) -> None:
        if program == self._program:
            self._left.setdefault(size, []).append(at)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for what torch does inside `with`."""
        named = kwargs or {}
        if (shape_of := _NEW.get(func)) is not None:
            dtype = named.get("dtype") or (args[0].dtype if isinstance(args[0], Tensor) else torch.get_default_dtype())
            return self.take(shape_of(*args, **named), dtype)
        result = func(*args, **named)
        self.strayed = self.strayed or not func.is_view or not _seen_through(args, result)
        return result


def _seen_through(args: Sequence[Any], result: Any) -> bool:
    """Whether all of a result lies where an argument does; what may copy calls itself a view (`contiguous`)."""
    found = result if isinstance(result, list | tuple) else [result]
    places = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
    return all(isinstance(one, Tensor) and one.untyped_storage().data_ptr() in places for one in found)


def _inputs(x: Tensor, steps: Mapping[str, Any]) -> list[Tensor]:
    """All that differs between steps of one form: the rows, then of each kind the same number, copies last if any."""
    found = [x]
    for step in steps.values():
        rows, copied = step.plan.rows, step.plan.copied
        found += [step.cos, step.sin, step.plan.slots, rows.first, rows.last]
        found += [rows.begin, rows.end, rows.tables, rows.tiles, rows.pages]
        found += [] if copied is None else [*copied, step.plan.copies]
    return found


def _placed(
    inputs: Sequence[Tensor], steps: Mapping[str, Any], rooms: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """The steps over other tensors, in the order of `_inputs`."""
    x, *others = inputs
    left, placed = iter(others), {}
    for kind, step in steps.items():
        cos, sin, slots, first, last, begin, end, tables, tiles, pages = (next(left) for _ in range(_PAGES + 1))
        source, to, copies = (None, None, None) if step.plan.copied is None else (next(left) for _ in range(3))
        rows = replace(
            step.plan.rows,
            first=first, last=last, begin=begin, end=end, tables=tables, tiles=tiles, pages=pages, rooms=rooms[kind],
        )  # fmt: skip
        copied = None if step.plan.copied is None else (source, to)
        plan = replace(step.plan, slots=slots, rows=rows, copied=copied, copies=copies)
        placed[kind] = replace(step, cos=cos, sin=sin, plan=plan)
    return x, placed


def _shapes(inputs: Sequence[Tensor], kinds: int) -> list[tuple[int, ...]]:
    """What a program was made for: inputs' shapes, with room for a tile a row, and for pages and copies to grow.

    So rows are all that programs differ by, whoever they belong to, until a context outgrows them.
    """
    rows, shapes = len(inputs[0]), [tuple(tensor.shape) for tensor in inputs]
    size = (len(inputs) - 1) // kinds
    for first in range(1, len(inputs), size):
        for index in _TILES:
            shapes[first + index] = (rows,)
        for index, least in ((_PAGES, _LOOSE), *((one, _LOOSE_COPIES) for one in _COPIES if one < size)):
            shapes[first + index] = (_grown(len(inputs[first + index]), least),)
    return shapes


def _room(step: Any) -> tuple[int, ...]:
    """The shape of the scores' rooms, with room to grow."""
    *others, room = step.plan.rows.rooms.shape
    return (*others, _grown(room, _LOOSE_ROOM) + _APART)


def _grown(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


class _RunArguments(ctypes.Structure):
    """`entries`: pairs of a function and its arguments, `count` of them; `barrier`: what threads wait at."""

    _fields_ = [(name, ctypes.c_int64) for name in ("entries", "count", "barrier")]


@lru_cache(maxsize=1)
def _compiled() -> int:
    """Where the loop over a program's kernels lies."""
    module = ir.Module("repeated")
    write = kernel(module, "repeat", 1)
    build = write.build
    given = {name: build.load(at) for name, at in write.fields(_RunArguments).items()}
    entries = write.integers(given["entries"])
    task = ir.FunctionType(ir.VoidType(), [INT.as_pointer()])
    wait = build.inttoptr(given["barrier"], ir.FunctionType(ir.VoidType(), []).as_pointer())
    with write.counting(number(0), given["count"]) as index:
        function, arguments = (build.load(write.at(entries, write.times(index, 2), number(n))) for n in range(2))
        build.call(build.inttoptr(function, task.as_pointer()), [build.inttoptr(arguments, INT.as_pointer())])
        build.call(wait, [])
    build.ret_void()
    return compile_module(module, ["repeat"]).functions["repeat"]
