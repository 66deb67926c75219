"""A block's tokens one after another as one call: the sequential head without a state of its own.

A task is a block. Token by token its row of W_1 is fetched, turned into biases by the very product that a batch takes,
and the pass of `choice_llvm` chooses, whose token the next row is fetched by. Nothing returns to Python in between: of
some 130 microseconds a token, calls were four fifths.

Knows addresses. What is drafted and shipped are `sequential_llvm`'s.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels import team
from dspark.kernels.linear_int8 import Int8Linear
from dspark.kernels.linear_llvm import Streamed
from dspark.kernels.parts_llvm import INT, compile_module, kernel, number
from dspark.kernels.rows_llvm import CodeArguments
from dspark.kernels.rowwise_llvm import code_row
from dspark.kernels.tiles_llvm import ProductArguments
from services.draft.kernels.choice_llvm import ChoiceArguments
from services.draft.kernels.choice_llvm import compiled as choosing

__all__ = ["Fields", "chosen_along", "grid"]

Fields: TypeAlias = dict[str, Any]
"""Arguments by name: an integer for all tokens of all blocks, or (b, n) of them."""
_Call: TypeAlias = tuple[int, NDArray[np.int64]]
"""A function, and its arguments for each token of each block, (b, n, fields)."""


class _SequenceArguments(ctypes.Structure):
    """Block r has `count` tokens behind the first of `tokens` (blocks, count + 1).

    `latents` (blocks, count, rank) float32 are rows of `table` (any, rank), by `places` (vocabulary,) int64 where that
    is not 0. `entries` (blocks, count, calls, 2): functions and their arguments.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("tokens", "places", "table", "latents", "rank", "entries", "calls", "count", "blocks", "next")
    ]


def chosen_along(bias: Streamed, table: Tensor, places: Tensor | None, tokens: Tensor, choice: Fields) -> Tensor:
    """Fill `tokens` (b, n + 1) int64 behind their first; returns latents (b, n, r), the rows of W_1.

    Args:
        bias: the product with W_2.
        table: W_1, float32 (any, r), contiguous.
        places: rows of W_1 by target ids, int64; None where each token has its own.
        tokens: the anchors first.
        choice: `ChoiceArguments` of each token, but for biases and tokens.
    """
    blocks, count = shape = tokens.shape[0], tokens.shape[1] - 1
    latents = torch.empty(blocks, count, table.shape[1])
    kept: list[Tensor] = []
    calls = _biased(bias, latents, kept)
    biases = kept[-1].data_ptr() + 4 * bias.width * grid(blocks, 1, 1)
    behind = tokens.data_ptr() + 8 + 8 * grid(blocks, count, count + 1)
    calls.append((choosing(), _arguments(ChoiceArguments, shape, {"bias": biases, "tokens": behind} | choice)))
    entries = np.empty((blocks, count, len(calls), 2), np.int64)
    for index, (function, arguments) in enumerate(calls):
        entries[:, :, index, 0] = function
        entries[:, :, index, 1] = arguments.ctypes.data + arguments.strides[1] * grid(blocks, count, count)
    sequence = _SequenceArguments(
        tokens.data_ptr(), 0 if places is None else places.data_ptr(), table.data_ptr(), latents.data_ptr(),
        table.shape[1], entries.ctypes.data, len(calls), count, blocks, 0,
    )  # fmt: skip
    (team.run if blocks > 1 else team.alone)(_compiled(), sequence)
    return latents


def _biased(bias: Streamed, latents: Tensor, kept: list[Tensor]) -> list[_Call]:
    """Calls that lead from latents to biases; into `kept` goes what they need meanwhile, biases (b, width) last."""
    *shape, rank = latents.shape
    blocks, count = shape
    function, sizes = bias.one_row
    out, room = torch.empty(blocks, bias.width), torch.empty(blocks, 4 * rank, dtype=torch.uint8)
    scales = torch.empty(blocks, 1)
    kept += [room, scales, out]
    rows = grid(blocks, 1, 1)
    x = latents.data_ptr() + 4 * rank * grid(blocks, count, count)
    rooms = room.data_ptr() + 4 * rank * rows
    own: Fields = {"scales": scales.data_ptr() + 4 * rows, "out": out.data_ptr() + 4 * bias.width * rows, **sizes}
    if not isinstance(bias, Int8Linear):
        return [(function, _arguments(ProductArguments, (blocks, count), {"x": x, "rooms": rooms} | own))]
    coding, row = code_row(rank)
    codes = _arguments(CodeArguments, (blocks, count), {"x": x, "out": rooms, "scales": own["scales"]} | dict(row))
    return [(coding, codes), (function, _arguments(ProductArguments, (blocks, count), {"x": rooms} | own))]


def _arguments(kind: type[ctypes.Structure], shape: tuple[int, int], fields: Fields) -> NDArray[np.int64]:
    """Arguments for each token of each block; what is not named is 0."""
    own = np.zeros((*shape, len(kind._fields_)), np.int64)
    for name, value in fields.items():
        own[..., _place(kind, name)] = value
    return own


@lru_cache(maxsize=64)
def _place(kind: type[ctypes.Structure], name: str) -> int:
    """All fields have 64 bits."""
    return [field for field, *_ in kind._fields_].index(name)


@lru_cache(maxsize=64)
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
