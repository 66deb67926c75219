"""A target's processed distribution as device functions: what filters leave of a row, its mass, and draws from it.

The same law as `dspark.sampling.processed`: the most likely tokens (the head) in float64, all others (the rest) as
float32 weights relative to the most likely token's, summed in float64 in the order of token ids. Filters keep a
beginning of the row's order, so what they leave is everything inside one cut (`dspark.kernels.top_triton`). Nearly
always that lies in the head, or is the whole row. So the rest is weighed tile by tile (`dspark.kernels.tiles_triton`)
by whoever reads the row first, relative to each tile's greatest logit as the row's is not known yet, and only tiles
with a token of the head are looked at again. Where a cut lies in the rest, it is found by halving the range of keys,
one program passing over the row each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.top_triton import inside_cut, last_of_equals, logits_at, nth_key, ordered

__all__ = [
    "cut_rest_by_mass",
    "cut_rest_by_rank",
    "cut_rest_by_weight",
    "passing",
    "pick_rest",
    "pick_rest_by_tile",
    "rest_mass",
    "rest_of_tiles",
    "scale_of",
    "weight",
]


@triton.jit
def scale_of(temperature):
    """1 / temperature in float32, kept finite."""
    return tl.minimum(tl.maximum(1.0 / temperature, 1e-30), 1e30).to(tl.float32)


@triton.jit
def weight(x, greatest, scale):
    """Float32 weights of logits relative to the greatest logit's."""
    return tl.exp((x - greatest) * scale)


@triton.jit
def _rest_weights(row, at, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits: tl.constexpr):
    """Float64 weights of tokens `at` inside the cut but not in the head, else 0; and all their keys."""
    x = logits_at(row, at, vocab)
    key = ordered(x, bits)
    here = (at < vocab) & inside_cut(key, at, cut_key, cut_id) & (inside_cut(key, at, head_key, head_id) == 0)
    return tl.where(here, weight(x, greatest, scale), 0.0).to(tl.float64), key


@triton.jit
def rest_mass(row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits: tl.constexpr, block: tl.constexpr):
    """Total weight of the rest inside a cut, float64."""
    mass = tl.cast(0.0, tl.float64)
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        w, _ = _rest_weights(row, at, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits)
        mass += tl.sum(w, 0)
    return mass


@triton.jit
def cut_rest_by_rank(row, vocab, count, bits: tl.constexpr, block: tl.constexpr):
    """The cut behind the row's `count` most likely tokens."""
    key, need = nth_key(row, vocab, count, bits, block)
    return key, last_of_equals(row, vocab, key, need, bits, block)


@triton.jit
def cut_rest_by_mass(
    row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, target,
    bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The tighter cut behind the first of the rest's tokens with which its weights reach `target`."""
    low, high = cut_key.to(tl.int64), head_key.to(tl.int64)
    while low < high:  # the least key above which less than the target lies
        middle = (low + high) // 2
        key = middle.to(tl.uint32)
        nobody = tl.cast(-1, tl.int32)
        if rest_mass(row, vocab, greatest, scale, head_key, head_id, key, nobody, bits, block) < target:
            high = middle
        else:
            low = middle + 1
    key = low.to(tl.uint32)
    nobody = tl.cast(-1, tl.int32)
    above = rest_mass(row, vocab, greatest, scale, head_key, head_id, key, nobody, bits, block)
    limit = tl.where(key == cut_key, cut_id, vocab)
    last = tl.cast(-1, tl.int32)
    seen = tl.cast(0.0, tl.float64)
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        w, keys = _rest_weights(row, at, vocab, greatest, scale, head_key, head_id, key, limit, bits)
        w = tl.where(keys == key, w, 0.0)
        before = above + seen + tl.cumsum(w, 0) - w
        last = tl.maximum(last, tl.max(tl.where((w > 0.0) & (before < target), at, -1), 0))
        seen += tl.sum(w, 0)
    return key, last


@triton.jit
def cut_rest_by_weight(
    row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, least,
    bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The tighter cut behind the last of the rest's tokens of at least this weight."""
    lowest = head_key.to(tl.int64)
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        w, keys = _rest_weights(row, at, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits)
        lowest = tl.minimum(lowest, tl.min(tl.where(w >= least, keys.to(tl.int64), 1 << 33), 0))
    key = lowest.to(tl.uint32)
    return key, tl.where(key == cut_key, cut_id, vocab)


@triton.jit
def pick_rest(
    row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, aim,
    bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The token of the rest in which its running sum of weights, by token id, passes `aim`."""
    token, last = tl.cast(-1, tl.int32), tl.cast(-1, tl.int32)
    running = tl.cast(0.0, tl.float64)
    for first in range(0, vocab, block):
        if token < 0:
            at = first + tl.arange(0, block)
            w, _ = _rest_weights(row, at, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits)
            passed = (running + tl.cumsum(w, 0) > aim) & (w > 0.0)
            found = tl.min(tl.where(passed, at, vocab), 0)
            token = tl.where(found < vocab, found, token)
            last = tl.maximum(last, tl.max(tl.where(w > 0.0, at, -1), 0))
            running += tl.sum(w, 0)
    return tl.where(token < 0, last, token)  # the sums of one block may differ in the last bit


@triton.jit
def passing(weights, at, aim, nobody):
    """Of places `at` the last of positive weight before which the weights' sum is not above `aim`, and that sum."""
    before = tl.cumsum(weights, 0) - weights
    place = tl.max(tl.where((weights > 0.0) & (before <= aim), at, nobody), 0)
    return place, tl.sum(tl.where(at == place, before, 0.0), 0)


@triton.jit
def rest_of_tiles(
    row, maxima, sums, taken, vocab, tiles, size, greatest, scale, head_key, head_id,
    pitch: tl.constexpr, bits: tl.constexpr, tile: tl.constexpr, tile_block: tl.constexpr,
):  # fmt: skip
    """Total weight of the rest of an uncut row, float64; `sums` (tiles,) become the weights of its tiles' rest.

    Before, they are relative to each tile's own greatest logit and include the head, which lies in the tiles `taken`.
    """
    at, lane = tl.arange(0, tile_block), tl.arange(0, pitch)
    tops = tl.load(maxima + at, mask=at < tiles, other=float("-inf"))
    w = tl.load(sums + at, mask=at < tiles, other=0.0) * weight(tops, greatest, scale)
    tl.debug_barrier()  # what is read is overwritten, here and below by other threads
    tl.store(sums + at, w, mask=at < tiles)
    own = lane < tl.minimum(size, tiles)
    place = tl.load(taken + lane, mask=own, other=tiles)
    token = place[:, None] * tile + tl.arange(0, tile)[None, :]
    w, _ = _rest_weights(row, token, vocab, greatest, scale, head_key, head_id, 0, vocab, bits)
    tl.debug_barrier()
    tl.store(sums + place, tl.sum(w, 1).to(tl.float32), mask=own)
    tl.debug_barrier()
    return tl.sum(tl.load(sums + at, mask=at < tiles, other=0.0).to(tl.float64), 0)


@triton.jit
def pick_rest_by_tile(
    row, sums, vocab, tiles, greatest, scale, head_key, head_id, aim,
    bits: tl.constexpr, tile: tl.constexpr, tile_block: tl.constexpr,
):  # fmt: skip
    """As `pick_rest`, of an uncut row, by what `rest_of_tiles` left in `sums`; -1 where a tile's sum was rounding."""
    at = tl.arange(0, tile_block)
    w = tl.load(sums + at, mask=at < tiles, other=0.0).to(tl.float64)
    place, before = passing(w, at, aim, 0)
    share = (aim - before) / tl.sum(tl.where(at == place, w, 0.0), 0)
    token = place * tile + tl.arange(0, tile)
    w, _ = _rest_weights(row, token, vocab, greatest, scale, head_key, head_id, 0, vocab, bits)
    token, _ = passing(w, token, share * tl.sum(w, 0), -1)
    return token
