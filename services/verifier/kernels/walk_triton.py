"""The walk along a request's judged rows: how many draft tokens stand, and what follows them in rejection mode.

Reads what `judge_triton` wrote, and looks at logits again only behind a block that fell: one program a request, which
sums the row in parts, looks for the part in which the draw falls, and then for the token. What drafts take away is
subtracted from the sums of the parts; only the part that is drawn from compares its tokens with them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.noise_triton import keyed_word, uniform
from dspark.kernels.top_triton import inside_cut, logits_at, ordered
from services.verifier.kernels.law_triton import passing, scale_of, weight

__all__ = ["walk_kernel"]


@triton.jit
def _drawn(rows, r, ahead, stream: tl.constexpr):
    """Uniforms of the round's own, of one stream, `ahead` positions behind that of row r."""
    none = tl.zeros_like(ahead)
    position, committed = none + tl.load(rows + 8 * r + 1) + ahead, none + tl.load(rows + 8 * r + 5)
    return uniform(keyed_word(tl.load(rows + 8 * r + 4), committed, position, none + stream))


@triton.jit
def _shared(
    logits, rows, laws, marks, masses, r, kept, stride, q_ids, q_shares, q_count,
    bits: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Sum over the drafter's tokens at row r of min(w p, q), `kept` being w."""
    row = logits + tl.load(rows + 8 * r) * stride
    cut_key, cut_id = tl.load(marks + 5 * r + 1).to(tl.uint32), tl.load(marks + 5 * r + 2).to(tl.int32)
    total, greatest = tl.load(masses + 3 * r), tl.load(masses + 3 * r + 1)
    temperature = tl.load(laws + 4 * r)
    shared = tl.cast(0.0, tl.float64)
    for first in range(0, q_count, chunk):
        n = first + tl.arange(0, chunk)
        ids = tl.load(q_ids + r * q_count + n, mask=n < q_count, other=-1)
        shares = tl.load(q_shares + r * q_count + n, mask=n < q_count, other=0.0)
        x = tl.load(row + ids, mask=ids >= 0, other=float("-inf")).to(tl.float32)
        here = (ids >= 0) & inside_cut(ordered(x, bits), ids.to(tl.int32), cut_key, cut_id)
        p = tl.where(here, tl.exp((x.to(tl.float64) - greatest) / temperature) / total, 0.0)
        shared += tl.sum(tl.minimum(kept * p, shares), 0)
    return shared


@triton.jit
def _tried(
    logits, rows, laws, marks, masses, first_row, count, stride, q_ids, q_shares, q_count,
    reach: tl.constexpr, bits: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """How many of a block's tokens stand by rejection, and their w; the place of a broken row that it comes to.

    As `services.verifier.trial.Trial`, row by row.
    """
    lane = tl.arange(0, reach).to(tl.int64)
    chances = tl.where(lane < count, _drawn(rows, first_row, lane, 4), 1.0)
    stood, at = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    left, kept = tl.cast(1.0, tl.float64), tl.cast(1.0, tl.float64)
    going = tl.cast(1, tl.int32)
    while going != 0:
        r = first_row + at
        if (tl.load(marks + 5 * r) == 0) | (at == count):
            stood, left = at, kept
            going = tl.cast(0, tl.int32)
        else:
            if at > 0:
                over = tl.maximum(kept - _shared(
                    logits, rows, laws, marks, masses, r, kept, stride, q_ids, q_shares, q_count, bits, chunk
                ), 0.0)  # fmt: skip
                if tl.sum(tl.where(lane == at - 1, chances, 0.0), 0) * (over + 1.0 - kept) < over:
                    stood, left = at, kept
            following = tl.minimum(kept * tl.load(masses + 3 * r + 2) / tl.load(laws + 4 * r + 3), 1.0)
            aim = tl.sum(tl.where((lane == at) & (at + 1 == count), chances, 0.0), 0)  # the last must stand by itself
            if following > aim:
                kept = following
                at += 1
            else:
                going = tl.cast(0, tl.int32)
    return stood, left


@triton.jit
def _left(
    row, at, vocab, greatest, scale, cut_key, cut_id, total, kept, q_ids, q_shares, q_count,
    bits: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Float64 weights max(0, p - q / w) of tokens `at`, in units of the most likely token's; `kept` is w."""
    x = logits_at(row, at, vocab)
    here = (at < vocab) & inside_cut(ordered(x, bits), at, cut_key, cut_id)
    w = tl.where(here, weight(x, greatest, scale), 0.0).to(tl.float64)
    low, high = tl.min(at, 0), tl.max(at, 0)
    for first in range(0, q_count, chunk):
        n = first + tl.arange(0, chunk)
        ids = tl.load(q_ids + n, mask=n < q_count, other=-1)
        if tl.sum(((ids >= low) & (ids <= high)).to(tl.int32), 0) > 0:
            shares = tl.load(q_shares + n, mask=n < q_count, other=0.0)
            w -= tl.sum(tl.where(ids[None, :] == at[:, None], shares[None, :] / kept * total, 0.0), 1)
    return tl.maximum(w, 0.0)


@triton.jit
def _whole(row, at, vocab, greatest, scale, cut_key, cut_id, bits: tl.constexpr):
    """Float64 weights p of tokens `at`, in units of the most likely token's."""
    x = logits_at(row, at, vocab)
    here = (at < vocab) & (at >= 0) & inside_cut(ordered(x, bits), at, cut_key, cut_id)
    return tl.where(here, weight(x, greatest, scale), 0.0).to(tl.float64)


@triton.jit
def _part_sums(
    row, vocab, greatest, scale, cut_key, cut_id, total, kept, q_ids, q_shares, q_count,
    bits: tl.constexpr, part: tl.constexpr, parts: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Sums of max(0, p - q / w) over every part of the row, float64 (parts,)."""
    lane = tl.arange(0, parts)
    sums = tl.zeros((parts,), tl.float64)
    for first in range(0, vocab, part):
        w = _whole(row, first + tl.arange(0, part), vocab, greatest, scale, cut_key, cut_id, bits)
        sums = tl.where(lane == first // part, tl.sum(w, 0), sums)
    for first in range(0, q_count, chunk):
        n = first + tl.arange(0, chunk)
        ids = tl.load(q_ids + n, mask=n < q_count, other=-1).to(tl.int32)
        shares = tl.load(q_shares + n, mask=n < q_count, other=0.0)
        w = _whole(row, ids, vocab, greatest, scale, cut_key, cut_id, bits)
        less = tl.minimum(w, shares / kept * total)
        sums -= tl.sum(tl.where((ids >= 0)[None, :] & ((ids // part)[None, :] == lane[:, None]), less[None, :], 0.0), 1)
    return tl.maximum(sums, 0.0)


@triton.jit
def _pick(
    row, start, end, aim, vocab, greatest, scale, cut_key, cut_id, total, kept, q_ids, q_shares, q_count,
    bits: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """The token from `start` up to `end` in which the sum of max(0, p - q / w) passes a share `aim` of it, or -1."""
    left = tl.cast(0.0, tl.float64)
    for first in range(start, end, block):
        at = first + tl.arange(0, block)
        w = _left(row, at, vocab, greatest, scale, cut_key, cut_id, total, kept, q_ids, q_shares, q_count, bits, chunk)
        left += tl.sum(w, 0)
    picked, running = tl.cast(-1, tl.int32), tl.cast(0.0, tl.float64)
    for first in range(start, end, block):
        at = first + tl.arange(0, block)
        w = _left(row, at, vocab, greatest, scale, cut_key, cut_id, total, kept, q_ids, q_shares, q_count, bits, chunk)
        place, _ = passing(w, at, aim * left - running, -1)
        picked = tl.maximum(picked, place)
        running += tl.sum(w, 0)
    return picked


@triton.jit
def walk_kernel(
    logits, rows, laws, marks, masses, requests, q_ids, q_shares, out, vocab, stride, q_pitch,
    reach: tl.constexpr, bits: tl.constexpr, part: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
    chunk: tl.constexpr,
):  # fmt: skip
    """One request, `requests` (n, 2) int64: first row and draft tokens; `out` (n, 3) int64: accepted, token, sound.

    `q_ids` and `q_shares` (R, q_pitch) are each row's q, ids -1 where there is none.
    """
    n = tl.program_id(0)
    first_row, count = tl.load(requests + 2 * n), tl.load(requests + 2 * n + 1)
    accepted, kept = tl.cast(0, tl.int64), tl.cast(1.0, tl.float64)
    tested = (tl.load(rows + 8 * first_row + 6) & 2) != 0
    if tested:
        accepted, kept = _tried(
            logits, rows, laws, marks, masses, first_row, count, stride, q_ids, q_shares, q_pitch, reach, bits, chunk
        )
    else:
        lane = tl.arange(0, reach)
        stood = tl.load(marks + 5 * (first_row + lane) + 4, mask=lane < count, other=0)
        accepted = tl.min(tl.where(stood == 0, lane, reach), 0).to(tl.int64)
    r = first_row + accepted
    token, sound = tl.load(marks + 5 * r + 3), tl.load(marks + 5 * r)
    if tested & (accepted < count) & (sound != 0):
        row = logits + tl.load(rows + 8 * r) * stride
        cut_key, cut_id = tl.load(marks + 5 * r + 1).to(tl.uint32), tl.load(marks + 5 * r + 2).to(tl.int32)
        total, greatest = tl.load(masses + 3 * r), tl.load(masses + 3 * r + 1).to(tl.float32)
        scale = scale_of(tl.load(laws + 4 * r))
        ids, shares = q_ids + r * q_pitch, q_shares + r * q_pitch
        sums = _part_sums(
            row, vocab, greatest, scale, cut_key, cut_id, total, kept, ids, shares, q_pitch, bits, part, parts, chunk
        )
        lane = tl.arange(0, parts)
        aim = tl.sum(_drawn(rows, r, tl.zeros((1,), tl.int64), 5), 0) * tl.sum(sums, 0)
        place, before = passing(sums, lane, aim, -1)
        # Where w p - q is nowhere positive the draft token fell by rounding: the coupled choice is as good.
        if place >= 0:
            share = (aim - before) / tl.sum(tl.where(lane == place, sums, 0.0), 0)
            start, end = place * part, tl.minimum(place * part + part, vocab)
            picked = _pick(
                row, start, end, share, vocab, greatest, scale, cut_key, cut_id, total, kept, ids, shares, q_pitch,
                bits, block, chunk,
            )  # fmt: skip
            token = tl.where(picked < 0, token, picked.to(tl.int64))
    tl.store(out + 3 * n, accepted.to(tl.int64))
    tl.store(out + 3 * n + 1, token)
    tl.store(out + 3 * n + 2, sound)
