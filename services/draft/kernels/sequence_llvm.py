"""A block's tokens one after another as one call: the sequential head without a state of its own.

A task is a block. Token by token its row of W_1 is fetched, turned into biases by the very product that a batch takes,
and the pass of `choice_llvm` chooses, whose token the next row is fetched by. Nothing returns to Python in between: of
some 130 microseconds a token, calls were four fifths.

Knows addresses. What is drafted and shipped are `sequential_llvm`'s.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels import team
from dspark.kernels.linear_int8 import Int8Linear
from dspark.kernels.linear_llvm import Streamed
from dspark.kernels.parts_llvm import INT, compile_module, kernel, number
from dspark.kernels.product_llvm import ProductArguments
from dspark.kernels.rows_llvm import CodeArguments
from dspark.kernels.rowwise_llvm import code_row
from services.draft.kernels.choice_llvm import ChoiceArguments
from services.draft.kernels.choice_llvm import compiled as choosing

__all__ = ["Along", "Found", "Shape"]

Fields: TypeAlias = dict[str, Any]
"""Arguments by name: an integer for all tokens of all blocks, or (b, n) of them."""
Rows: TypeAlias = Sequence[tuple[int, int, int, int]]
_Call: TypeAlias = tuple[int, NDArray[np.int64]]
"""A function, and its arguments for each token of each block, (b, n, fields)."""
_ALIGNED = 64


class _SequenceArguments(ctypes.Structure):
    """Block r has `count` tokens behind the first of `tokens` (blocks, count + 1).

    `latents` (blocks, count, rank) float32 are rows of `table` (any, rank), by `places` (vocabulary,) int64 where that
    is not 0. `entries` (blocks, count, calls, 2): functions and their arguments.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("tokens", "places", "table", "latents", "rank", "entries", "calls", "count", "blocks", "next")
    ]


class Shape(NamedTuple):
    """Of a call: blocks, their tokens, the draft vocabulary, and how many tokens a choice looks at."""

    blocks: int
    tokens: int
    width: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What blocks came to: arrays of one memory.

    `tokens` (b, n + 1) begin with the anchors, `others` (b, n) are what a coupled choice would be next; `latents`
    (b, n, r) are the rows of W_1; `logits` (b, n, width) those that tokens were chosen from, `chosen` (b, n) their
    places in it; of the tokens looked at `counts` (b, n) and `places` and `weights` (b, n, most).
    """

    tokens: NDArray[np.int64]
    others: NDArray[np.int64]
    latents: NDArray[np.float32]
    logits: NDArray[np.float32]
    chosen: NDArray[np.int64]
    counts: NDArray[np.int64]
    places: NDArray[np.int64]
    weights: NDArray[np.float64]


class Along:
    """The head over blocks of one shape. For one thread.

    All arguments are laid out once, as if everything lay at address 0, with what is to be added to each: the address
    of a call's own memory, or that of its base logits. Anew for each call they took three times what the call does.
    """

    def __init__(self, bias: Streamed, table: Tensor, places: Tensor | None, d2t: Tensor | None, shape: Shape) -> None:
        """`bias` is the product with W_2, `table` W_1, float32 (any, r), contiguous.

        `places`: its rows by target ids, int64; None where each token has its own. `d2t`: as in `ChoiceArguments`.
        """
        self._bias, self._table, self._places, self._d2t, self._shape = bias, table, places, d2t, shape
        rank = table.shape[1]
        blocks, count, width, most = shape
        self._slab = _Slab()
        for name, dtype, sizes in (
            ("tokens", np.int64, (blocks, count + 1)), ("others", np.int64, (blocks, count)),
            ("rows", np.int64, (blocks, count, 4)), ("temperatures", np.float64, (blocks,)),
            ("latents", np.float32, (blocks, count, rank)), ("logits", np.float32, (blocks, count, width)),
            ("chosen", np.int64, (blocks, count)), ("counts", np.int64, (blocks, count)),
            ("places", np.int64, (blocks, count, most)), ("weights", np.float64, (blocks, count, most)),
            ("scales", np.float32, (blocks,)), ("room", np.uint8, (blocks, 4 * rank)),
            ("biases", np.float32, (blocks, bias.width)),
        ):  # fmt: skip
            self._slab.add(name, dtype, sizes)
        self._words = self._laid(0, 0)
        self._slab.add("words", np.int64, self._words.shape)
        self._words = self._laid(0, 0)
        self._by_slab = self._laid(1, 0) - self._words
        self._by_base = self._laid(0, 1) - self._words

    def __call__(self, base: Tensor, anchors: Sequence[int], rows: Rows, temperatures: Sequence[float]) -> Found:
        """Of base logits (b, n, width) float32, contiguous.

        `rows` are each block's integers as in `ChoiceArguments`, at its first position.
        """
        blocks, count, *_ = self._shape
        memory = np.empty(self._slab.size, np.uint8)
        at = memory.ctypes.data
        parts = self._slab.parts(memory)
        parts["tokens"][:, 0] = anchors
        parts["rows"][:] = np.array(rows)[:, None]
        parts["rows"][:, :, 1] += np.arange(count)
        parts["temperatures"][:] = temperatures
        words = parts["words"]
        np.multiply(self._by_slab, at, out=words)
        words += self._by_base * base.data_ptr()
        words += self._words
        own, places = self._slab.offsets, self._places
        sequence = _SequenceArguments(
            at + own["tokens"], 0 if places is None else places.data_ptr(), self._table.data_ptr(),
            at + own["latents"], self._table.shape[1], at + own["words"], self._calls, count, blocks, 0,
        )  # fmt: skip
        (team.run if blocks > 1 else team.alone)(_compiled(), sequence)
        return Found(**{name: parts[name] for name in Found.__dataclass_fields__})

    def _laid(self, slab: int, base: int) -> NDArray[np.int64]:
        """Entries, then the arguments of each call, with the memory and the base logits at these addresses."""
        blocks, count, width, most = shape = self._shape
        at = {name: slab + offset for name, offset in self._slab.offsets.items()}
        along = grid(blocks, count, count)
        choice: Fields = {
            "base": base + 4 * width * along, "width": width, "d2t": 0 if self._d2t is None else self._d2t.data_ptr(),
            "bias": at["biases"] + 4 * self._bias.width * grid(blocks, 1, 1), "rows": at["rows"] + 32 * along,
            "temperatures": at["temperatures"] + 8 * grid(blocks, 1, 1), "most": most, "count": 1,
            "tokens": at["tokens"] + 8 + 8 * grid(blocks, count, count + 1), "others": at["others"] + 8 * along,
            "chosen": at["chosen"] + 8 * along,
            "logits": at["logits"] + 4 * width * along, "counts": at["counts"] + 8 * along,
            "places": at["places"] + 8 * most * along, "weights": at["weights"] + 8 * most * along,
        }  # fmt: skip
        calls = [*self._biased(at), (choosing(), _arguments(ChoiceArguments, shape, choice))]
        self._calls = len(calls)
        entries = np.empty((blocks, count, len(calls), 2), np.int64)
        behind = at.get("words", slab) + entries.nbytes
        for index, (function, arguments) in enumerate(calls):
            entries[:, :, index, 0] = function
            entries[:, :, index, 1] = behind + arguments.strides[1] * along
            behind += arguments.nbytes
        return np.concatenate([entries.ravel(), *(arguments.ravel() for _, arguments in calls)])

    def _biased(self, at: Mapping[str, int]) -> list[_Call]:
        """Calls that lead from latents to biases."""
        shape, rank = self._shape, self._table.shape[1]
        blocks, count, *_ = shape
        function, sizes = self._bias.one_row
        rows = grid(blocks, 1, 1)
        x = at["latents"] + 4 * rank * grid(blocks, count, count)
        rooms, scales = at["room"] + 4 * rank * rows, at["scales"] + 4 * rows
        own: Fields = {"scales": scales, "out": at["biases"] + 4 * self._bias.width * rows, **sizes}
        if not isinstance(self._bias, Int8Linear):
            return [(function, _arguments(ProductArguments, shape, {"x": x, "rooms": rooms} | own))]
        coding, row = code_row(rank)
        codes = _arguments(CodeArguments, shape, {"x": x, "out": rooms, "scales": scales} | dict(row))
        return [(coding, codes), (function, _arguments(ProductArguments, shape, {"x": rooms} | own))]


class _Slab:
    """Where arrays lie in one memory."""

    def __init__(self) -> None:
        self.size = 0
        self.offsets: dict[str, int] = {}
        self._kinds: dict[str, tuple[type, tuple[int, ...], int]] = {}

    def add(self, name: str, dtype: type, shape: tuple[int, ...]) -> None:
        """Behind those that are there."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self.offsets[name], self._kinds[name] = self.size, (dtype, shape, size)
        self.size += -(-size // _ALIGNED) * _ALIGNED

    def parts(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The arrays."""
        offsets = self.offsets
        return {
            name: memory[offsets[name] : offsets[name] + size].view(dtype).reshape(shape)
            for name, (dtype, shape, size) in self._kinds.items()
        }


def _arguments(kind: type[ctypes.Structure], shape: Shape, fields: Fields) -> NDArray[np.int64]:
    """Arguments for each token of each block; what is not named is 0."""
    names = [name for name, *_ in kind._fields_]  # all of 64 bits
    own = np.zeros((shape.blocks, shape.tokens, len(names)), np.int64)
    for name, value in fields.items():
        own[..., names.index(name)] = value
    return own


def grid(blocks: int, count: int, pitch: int) -> NDArray[np.int64]:
    """(b, n): the number of block r's k-th token where a block has `pitch` of them."""
    return pitch * np.arange(blocks)[:, None] + np.arange(count)


@lru_cache(maxsize=1)
def _compiled() -> int:
    """Where the loop lies."""
    module = ir.Module("sequence")
    write = kernel(module, "along", 1)
    build, fields = write.build, write.fields(_SequenceArguments)
    given = {name: build.load(at) for name, at in fields.items()}
    entries, table = write.integers(given["entries"]), write.floats(given["table"])
    row = build.alloca(INT)
    task = ir.FunctionType(ir.VoidType(), [INT.as_pointer()]).as_pointer()
    with (
        write.taking(fields["next"], number(1), given["blocks"]) as (block, _),
        write.counting(number(0), given["count"]) as token,
    ):
        place = build.add(build.mul(block, given["count"]), token)
        before = write.at(write.integers(given["tokens"]), build.add(place, block))
        build.store(build.load(before), row)
        with build.if_then(build.icmp_signed("!=", given["places"], number(0))):
            build.store(build.load(write.at(write.integers(given["places"]), build.load(row))), row)
        source = write.at(table, build.mul(build.load(row), given["rank"]))
        to = write.at(write.floats(given["latents"]), build.mul(place, given["rank"]))
        with write.counting(number(0), given["rank"]) as index:
            build.store(build.load(write.at(source, index)), write.at(to, index))
        first = build.mul(build.mul(place, given["calls"]), number(2))
        with write.counting(number(0), given["calls"]) as call:
            pair = write.at(entries, first, write.times(call, 2))
            function, arguments = (build.load(write.at(pair, number(n))) for n in range(2))
            build.call(build.inttoptr(function, task), [build.inttoptr(arguments, INT.as_pointer())])
    build.ret_void()
    return compile_module(module, ["along"]).functions["along"]
