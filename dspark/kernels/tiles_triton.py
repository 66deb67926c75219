"""Device functions that find a row's most likely tokens from the greatest logits of its tiles.

A tile is so many tokens in a row. Whoever writes or first reads the logits leaves each tile's greatest, with as many
programs as there are tiles to share; one program a row then looks at little. The n tokens that come first in the row's
order lie in the n tiles that come first by their greatest logits, of equal ones the lower: a token elsewhere has one
before it in each of those. So the head is that of n tiles, exactly, and one block of registers holds them.

Knows no laws: what the tokens weigh is left to the services' kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.top_triton import logits_at, ordered

__all__ = ["fill_head", "first_token"]


@triton.jit
def _nth_of(keys, count, bits: tl.constexpr):
    """The `count`-th greatest (from 1) of a block of keys, bit by bit, and how many equal to it are among the first."""
    found, bit = tl.cast(0, tl.uint32), tl.cast(1 << (bits - 1), tl.uint32)
    for _ in range(bits):
        enough = tl.sum((keys >= (found | bit)).to(tl.int32), 0) >= count
        found = tl.where(enough, found | bit, found)
        bit = bit >> 1
    return found, count - tl.sum((keys > found).to(tl.int32), 0)


@triton.jit
def _first_of(keys, key, need):
    """Which of a block's keys are greater than `key`, or one of the first `need` equal to it."""
    equal = keys == key
    return (keys > key) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= need))


@triton.jit
def _keys_of(maxima, tiles, bits: tl.constexpr, tile_block: tl.constexpr):
    """All tiles' keys; a place behind the last tile has 0, which no logit has."""
    at = tl.arange(0, tile_block)
    keys = ordered(tl.load(maxima + at, mask=at < tiles, other=float("-inf")), bits)
    return tl.where(at < tiles, keys, 0), at


@triton.jit
def first_token(row, maxima, vocab, tiles, bits: tl.constexpr, tile: tl.constexpr, tile_block: tl.constexpr):
    """The most likely token of a row, int32."""
    keys, at = _keys_of(maxima, tiles, bits, tile_block)
    best = tl.min(tl.where(keys == tl.max(keys, 0), at, tiles - 1), 0)
    token = best * tile + tl.arange(0, tile)
    keys = tl.where(token < vocab, ordered(logits_at(row, token, vocab), bits), 0)
    return tl.min(tl.where(keys == tl.max(keys, 0), token, vocab - 1), 0)


@triton.jit
def fill_head(
    row, maxima, vocab, tiles, size, taken, ids, values,
    pitch: tl.constexpr, bits: tl.constexpr, tile: tl.constexpr, tile_block: tl.constexpr,
):  # fmt: skip
    """Write the `size` most likely tokens, by id, to `ids` (int32) and `values` (float32); the last in order as a cut.

    `taken` (pitch,) int32 gets the tiles in which they lie, ascending, the first min(size, tiles) of it. All is there
    to be read by every thread of the program.
    """
    keys, at = _keys_of(maxima, tiles, bits, tile_block)
    key, need = _nth_of(keys, tl.minimum(size, tiles), bits)
    first = _first_of(keys, key, need)
    tl.store(taken + tl.cumsum(first.to(tl.int32), 0) - 1, at, mask=first)
    tl.debug_barrier()  # other threads read what these wrote
    lane = tl.arange(0, pitch * tile)
    token = tl.load(taken + lane // tile, mask=lane // tile < tl.minimum(size, tiles), other=tiles) * tile + lane % tile
    x = logits_at(row, token, vocab)
    keys = tl.where(token < vocab, ordered(x, bits), 0)
    key, need = _nth_of(keys, size, bits)
    first = _first_of(keys, key, need)
    place = tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(ids + place, tl.minimum(token, vocab - 1), mask=first)
    tl.store(values + place, x, mask=first)
    tl.debug_barrier()
    return key, tl.max(tl.where(first & (keys == key), token, -1), 0)
