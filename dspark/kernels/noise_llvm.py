"""`noise.keyed_bits` by code compiled for the processor: the same bits in a twentieth of the time for a few numbers."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from llvmlite import ir

from dspark.kernels import team
from dspark.kernels.noise import MASK, MULTIPLIERS, ROUNDS, WEYL, Stream, common_shape
from dspark.kernels.parts_llvm import DOUBLE, Code, Writer, compile_module, kernel, number

__all__ = ["gumbel", "keyed_bits", "uniform"]

_ALONE = 1 << 11  # numbers that one thread has done before a team would begin


class _Arguments(ctypes.Structure):
    """Each address is of `count` 64-bit integers; threads take `share` at a time."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("seeds", "items", "positions", "streams", "bits", "count", "share", "next")
    ]


def keyed_bits(
    seeds: torch.Tensor, items: torch.Tensor, positions: torch.Tensor, streams: torch.Tensor
) -> torch.Tensor:
    """As `noise.keyed_bits`."""
    shape = common_shape(seeds, items, positions, streams)
    tensors = [t.expand(shape).contiguous() for t in (seeds, items, positions, streams)]
    bits = torch.empty_like(tensors[0])
    count = bits.numel()
    addresses = (t.data_ptr() for t in (*tensors, bits))
    run, share = (team.alone, count) if count <= _ALONE else (team.run, _ALONE // 4)
    run(_compiled().functions["keyed_bits"], _Arguments(*addresses, count, max(1, share), 0))
    return bits


@lru_cache(maxsize=1)
def _compiled() -> Code:
    module = ir.Module("noise")
    write = kernel(module, "keyed_bits", 1)
    build, fields = write.build, write.fields(_Arguments)
    given = {name: build.load(at) for name, at in fields.items()}
    arrays = {name: write.integers(given[name]) for name in list(fields)[:5]}
    with write.taking(fields["next"], given["share"], given["count"]) as share, write.counting(*share) as index:
        seed, item, position, stream, to = (write.at(array, index) for array in arrays.values())
        word = _philox(build, build.load(seed), [build.load(at) for at in (item, position, stream)])
        build.store(word, to)
    build.ret_void()
    return compile_module(module, ["keyed_bits"])


def uniform(build: ir.IRBuilder, seed: ir.Value, item: ir.Value, position: ir.Value, stream: Stream) -> ir.Value:
    """A float64 in (0, 1), as `noise.uniform` of the bits."""
    bits = _philox(build, seed, [item, position, number(int(stream))])
    whole = build.fadd(build.uitofp(bits, DOUBLE), ir.Constant(DOUBLE, 0.5))
    return build.fmul(whole, ir.Constant(DOUBLE, 2.0**-32))


def gumbel(write: Writer, seed: ir.Value, item: ir.Value, position: ir.Value, stream: Stream) -> ir.Value:
    """As `noise.gumbel` of the bits."""
    build = write.build
    logarithm = write.double("log", uniform(build, seed, item, position, stream))
    return build.fneg(write.double("log", build.fneg(logarithm)))


def _philox(build: ir.IRBuilder, seed: ir.Value, counter: list[ir.Value]) -> ir.Value:
    """Word 0 for three counter words, the fourth being 0; words are 64-bit integers below 2**32."""
    mask, half = number(MASK), number(32)
    words = [*counter, number(0)]
    keys = [build.and_(seed, mask), build.lshr(seed, half)]
    for _ in range(ROUNDS):
        products = [build.mul(words[2 * n], number(MULTIPLIERS[n])) for n in range(2)]
        high = [build.lshr(product, half) for product in products]
        low = [build.and_(product, mask) for product in products]
        mixed = [build.xor(build.xor(high[1 - n], words[2 * n + 1]), keys[n]) for n in range(2)]
        words = [mixed[0], low[1], mixed[1], low[0]]
        keys = [build.and_(build.add(key, number(step)), mask) for key, step in zip(keys, WEYL, strict=True)]
    return words[0]
