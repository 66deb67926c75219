"""Device functions that order a row of logits: greater first, equal ones by lower token id (`dspark.sampling.order`).

Values become unsigned keys of the same order. The n-th greatest of a whole row is found by counting digits of 8 bits,
from the top: two passes over bfloat16, four over float32, and every count is exact. A few most likely tokens are found
with less (`tiles_triton`). Where a row is cut is a pair (key, id): what comes before the cut, and the cut itself, is
inside. All filters of a distribution keep a beginning of this order, so that one cut says what each of them, and all
together, leave.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["inside_cut", "key_bits", "last_of_equals", "logits_at", "nth_key", "ordered", "ranked"]


def key_bits(dtype: torch.dtype) -> int:
    """Bits that tell the values of a dtype apart."""
    return 16 if dtype == torch.bfloat16 else 32


@triton.jit
def ordered(x, bits: tl.constexpr):
    """Keys, uint32 below 2**bits, in the order of float32 values; -0.0 equals 0.0."""
    x = tl.where(x == 0.0, 0.0, x)
    key = x.to(tl.int32, bitcast=True)
    key = key ^ ((key >> 31) & 0x7FFFFFFF)
    return (key.to(tl.uint32, bitcast=True) ^ 0x80000000) >> (32 - bits)


@triton.jit
def logits_at(row, at, vocab):
    """Float32 logits at token ids `at`, -inf where there is no such token: before the first, or past the vocabulary."""
    return tl.load(row + at, mask=(at >= 0) & (at < vocab), other=float("-inf")).to(tl.float32)


@triton.jit
def inside_cut(key, at, cut_key, cut_id):
    """Whether tokens come before a cut or are it."""
    return (key > cut_key) | ((key == cut_key) & (at <= cut_id))


@triton.jit
def nth_key(row, vocab, count, bits: tl.constexpr, block: tl.constexpr):
    """Key of the `count`-th token of a row (from 1), and how many tokens of just this key are among the first."""
    digit = tl.arange(0, 512)
    prefix = tl.cast(0, tl.uint32)
    need = tl.cast(count, tl.int32)
    for step in tl.static_range(bits // 8):
        shift = bits - 8 - 8 * step
        counts = tl.zeros((512,), tl.int32)
        for first in range(0, vocab, block):
            at = first + tl.arange(0, block)
            key = ordered(logits_at(row, at, vocab), bits)
            here = at < vocab
            if step > 0:
                here = here & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram(tl.where(here, (key >> shift) & 255, 256).to(tl.int32), 512)
        counts = tl.where(digit < 256, counts, 0)
        at_least = tl.cumsum(counts, 0, reverse=True)
        found = tl.max(tl.where((at_least >= need) & (digit < 256), digit, 0), 0)
        need = need - tl.sum(tl.where(digit > found, counts, 0), 0)
        prefix = (prefix << 8) | found.to(tl.uint32)
    return prefix, need


@triton.jit
def last_of_equals(row, vocab, key, need, bits: tl.constexpr, block: tl.constexpr):
    """Id of the `need`-th token (from 1, by id) whose key is `key`."""
    last = tl.cast(-1, tl.int32)
    seen = tl.cast(0, tl.int32)
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        equal = (ordered(logits_at(row, at, vocab), bits) == key) & (at < vocab)
        rank = seen + tl.cumsum(equal.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(equal & (rank <= need), at, -1), 0))
        seen += tl.sum(equal.to(tl.int32), 0)
    return last


@triton.jit
def ranked(ids_at, values_at, ids, values, greatest, temperature, size, pitch: tl.constexpr, chunk: tl.constexpr):
    """Each listed token's place in the order, int32 from 0, and the float64 weight of those before it.

    All pairs are compared, a chunk at a time, so that sums have one order. `ids` and `values` (pitch,) are what
    `tiles_triton.fill_head` wrote at `ids_at` and `values_at`; weights are exp((value - greatest) / temperature).
    """
    rank = tl.zeros((pitch,), tl.int32)
    before = tl.zeros((pitch,), tl.float64)
    for first in range(0, size, chunk):
        other = first + tl.arange(0, chunk)
        other_ids = tl.load(ids_at + other, mask=other < size, other=0)
        other_values = tl.load(values_at + other, mask=other < size, other=float("-inf"))
        weights = tl.exp((other_values.to(tl.float64) - greatest.to(tl.float64)) / temperature)
        greater = other_values[None, :] > values[:, None]
        greater = greater | ((other_values[None, :] == values[:, None]) & (other_ids[None, :] < ids[:, None]))
        greater = greater & (other < size)[None, :]
        rank += tl.sum(greater.to(tl.int32), 1)
        before += tl.sum(tl.where(greater, weights[None, :], 0.0), 1)
    return rank, before
