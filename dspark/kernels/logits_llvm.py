"""The passes over rows of float32 logits by code compiled for the processor: each row is read once a pass.

Rows in bfloat16 are gathered, and vocabularies that are no multiple of a block are copied, by torch: see `logits`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from llvmlite import ir

from dspark.kernels import logits as plain
from dspark.kernels import team
from dspark.kernels.logits import BLOCK, LogitKernels
from dspark.kernels.parts_llvm import FLOAT, Code, Writer, compile_module, host_lanes, kernel, number

__all__ = ["LLVM_LOGITS", "gather", "weigh"]

_BLOCKS = 64  # that a thread takes together: 16 KiB
_LEAST = -73.0  # a smaller power of e, in units of a row's width, is hardly a normal number: its weight is 0


class _GatherArguments(ctypes.Structure):
    """Row r of `values` (rows, width) is that of `logits` at `index[r]`; `maxima` (rows, blocks)."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("logits", "index", "values", "maxima", "width", "blocks", "parts", "tasks", "next")
    ]


class _WeighArguments(ctypes.Structure):
    """`values`, `weights` (rows, width); `scale`, `greatest` (rows,); `ids` (rows, listed); `sums` (rows, blocks).

    The greatest value's weight would be `share`.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("values", "weights", "scale", "greatest", "ids", "sums")),
        ("share", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("listed", "width", "blocks", "parts", "tasks", "next")),
    ]


def gather(logits: torch.Tensor, rows: Sequence[int], values: torch.Tensor) -> torch.Tensor:
    """As `logits.gather`."""
    if logits.dtype != torch.float32 or logits.shape[1] != values.shape[1] or not logits.is_contiguous():
        return plain.gather(logits, rows, values)
    count, width = values.shape
    index = torch.tensor(rows)
    maxima = values.new_empty(count, width // BLOCK)
    addresses = (t.data_ptr() for t in (logits, index, values, maxima))
    team.run(_compiled().functions["gather"], _GatherArguments(*addresses, width, *_sizes(count, width)))
    return maxima


def weigh(
    values: torch.Tensor, ids: torch.Tensor, temperature: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `logits.weigh`."""
    count, width = values.shape
    scale, ids = plain.scale_of(temperature).contiguous(), ids.contiguous()
    greatest = values.gather(1, ids[:, :1])
    sums = values.new_empty(count, width // BLOCK)
    addresses = (t.data_ptr() for t in (values, weights, scale, greatest, ids, sums))
    share = 2.0 ** -(width - 1).bit_length()  # a power of two loses no bits, and no row's sum is above 1
    sizes = ids.shape[1], width, *_sizes(count, width)
    team.run(_compiled().functions["weigh"], _WeighArguments(*addresses, share, *sizes))
    return torch.full_like(temperature, 1 / share), sums.double().cumsum(-1)


LLVM_LOGITS = LogitKernels(gather, weigh)


def _sizes(rows: int, width: int) -> tuple[int, int, int, int]:
    """Blocks of a row, parts of a row, tasks, and the first task."""
    blocks = width // BLOCK
    parts = -(-blocks // _BLOCKS)
    return blocks, parts, rows * parts, 0


@lru_cache(maxsize=1)
def _compiled() -> Code:
    module = ir.Module("logits")
    _Gather(kernel(module, "gather", host_lanes())).write()
    _Weigh(kernel(module, "weigh", host_lanes())).write()
    return compile_module(module, ["gather", "weigh"])


class _Passes(ABC):
    """A loop over parts of rows, some blocks each."""

    arguments: type[ctypes.Structure]

    def __init__(self, write: Writer) -> None:
        self._write, self._build = write, write.build
        self._fields = write.fields(self.arguments)
        self._given = {name: self._build.load(at) for name, at in self._fields.items()}

    def write(self) -> None:
        """The whole function."""
        write, build, given = self._write, self._build, self._given
        with write.taking(self._fields["next"], number(1), given["tasks"]) as (task, _):
            row, part = build.udiv(task, given["parts"]), build.urem(task, given["parts"])
            first = write.times(part, _BLOCKS)
            self.part(row, first, write.least(build.add(first, number(_BLOCKS)), given["blocks"]))
        build.ret_void()

    @abstractmethod
    def part(self, row: ir.Value, first: ir.Value, end: ir.Value) -> None:
        """Blocks first … end - 1 of a row."""

    def floats(self, name: str, *offsets: ir.Value) -> ir.Value:
        """A pointer into an array of float32."""
        return self._write.at(self._write.floats(self._given[name]), *offsets)

    def ints(self, name: str, *offsets: ir.Value) -> ir.Value:
        """A pointer into an array of 64-bit integers."""
        return self._write.at(self._write.integers(self._given[name]), *offsets)

    def of_row(self, row: ir.Value) -> tuple[ir.Value, ir.Value]:
        """How far a row lies inside arrays of its width, and inside arrays of its blocks."""
        return self._build.mul(row, self._given["width"]), self._build.mul(row, self._given["blocks"])


class _Gather(_Passes):
    arguments = _GatherArguments

    def part(self, row: ir.Value, first: ir.Value, end: ir.Value) -> None:
        write, build = self._write, self._build
        at, block_at = self.of_row(row)
        source = self.floats("logits", build.mul(build.load(self.ints("index", row)), self._given["width"]))
        values, maxima = self.floats("values", at), self.floats("maxima", block_at)
        with write.counting(first, end) as block:
            start, most = write.times(block, BLOCK), None
            for lane in range(0, BLOCK, write.lanes):
                value = write.load(write.at(source, start, number(lane)))
                write.store(value, write.at(values, start, number(lane)))
                most = value if most is None else write.maximum(most, value)
            build.store(write.folded(most, write.maximum), write.at(maxima, block))


class _Weigh(_Passes):
    arguments = _WeighArguments

    def part(self, row: ir.Value, first: ir.Value, end: ir.Value) -> None:
        write, build = self._write, self._build
        at, block_at = self.of_row(row)
        values, weights, sums = self.floats("values", at), self.floats("weights", at), self.floats("sums", block_at)
        scale, greatest = (write.broadcast(build.load(self.floats(name, row))) for name in ("scale", "greatest"))
        share = write.broadcast(write.rounded(self._given["share"]))
        begin, behind = write.times(first, BLOCK), write.times(end, BLOCK)
        with write.counting(begin, behind, write.lanes) as place:
            value = write.load(write.at(values, place))
            exponent = build.fmul(build.fsub(value, greatest), scale)
            counts = build.fcmp_ordered(">=", exponent, write.constant(_LEAST))
            weight = build.fmul(write.exp(exponent), share)
            write.store(build.select(counts, weight, write.zero), write.at(weights, place))
        self._leave_out(row, weights, begin, behind)
        with write.counting(first, end) as block:
            start, total = write.times(block, BLOCK), write.zero
            for lane in range(0, BLOCK, write.lanes):
                total = build.fadd(total, write.load(write.at(weights, start, number(lane))))
            build.store(write.folded(total, build.fadd), write.at(sums, block))

    def _leave_out(self, row: ir.Value, weights: ir.Value, begin: ir.Value, behind: ir.Value) -> None:
        """Weight 0 for the listed tokens of a part."""
        write, build = self._write, self._build
        listed = self._given["listed"]
        ids = self.ints("ids", build.mul(row, listed))
        with write.counting(number(0), listed) as index:
            token = build.load(write.at(ids, index))
            inside = build.icmp_unsigned("<", build.sub(token, begin), build.sub(behind, begin))
            with build.if_then(inside):
                build.store(ir.Constant(FLOAT, 0.0), write.at(weights, token))
