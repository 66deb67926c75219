"""Verification on the device: every row of every request at once, then each request's first difference.

`head_kernel` finds each row's most likely tokens, `judge_kernel` chooses the target's token and says whether it is the
draft token, `walk_kernel` counts how many stand and draws what follows them in rejection mode. They exchange:

- `rows` (R, 8) int64: row of the logits, position, draft token or -1, top_k or 0, seed, committed length, flags, 0;
- `laws` (R, 4) float64: temperature, top_p, min_p, q of the draft token;
- `marks` (R, 8) int64: sound, most likely token, last of the head as key and id, the cut as key and id, token, stands;
- `masses` (R, 3) float64: total weight, greatest logit, p of a draft token on trial by rejection.

In coupled mode rows behind a request's first difference are judged for nothing: the price of never asking the host in
between. Noise is that of `services.verifier.verification`, number for number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.noise_triton import gumbel, keyed_word, uniform
from dspark.kernels.top_triton import gather_head, inside_cut, last_of_equals, logits_at, nth_key, ordered, ranked
from services.verifier.kernels.law_triton import (
    cut_rest_by_mass,
    cut_rest_by_rank,
    cut_rest_by_weight,
    pick_rest,
    rest_mass,
    scale_of,
    weight,
)

__all__ = ["LAW", "REPORT", "SAMPLED", "TESTED", "head_kernel", "judge_kernel", "walk_kernel"]

SAMPLED, TESTED, LAW, REPORT = 1, 2, 4, 8
"""Flags of a row: temperature > 0; a draft token on trial by rejection; its law is needed; its head is reported."""


@triton.jit
def head_kernel(
    logits, rows, marks, head_ids, head_values, vocab, stride, size,
    pitch: tl.constexpr, bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Soundness, the most likely token, and where its law is needed the `size` most likely ones, in order of ids."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + 8 * r) * stride
    broken = tl.cast(0, tl.int32)
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        x = tl.load(row + at, mask=at < vocab, other=0.0).to(tl.float32)
        broken += tl.sum(((x != x) | (x == float("inf"))).to(tl.int32), 0)
    sound = (broken == 0).to(tl.int32)
    best, best_id = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        key = tl.where(at < vocab, ordered(logits_at(row, at, vocab, sound), bits), 0)
        greatest = tl.max(key, 0)
        if greatest > best:
            best = greatest
            best_id = tl.min(tl.where(key == greatest, at, vocab), 0)
    top_value = tl.load(row + best_id).to(tl.float32)
    sound = sound & (top_value > float("-inf")).to(tl.int32)  # for NaN it is 0 already
    tl.store(marks + 8 * r, sound.to(tl.int64))
    tl.store(marks + 8 * r + 1, best_id.to(tl.int64))
    if (tl.load(rows + 8 * r + 6) & 4) != 0:
        key, need = nth_key(row, vocab, sound, size, bits, block)
        last = last_of_equals(row, vocab, sound, key, need, bits, block)
        gather_head(row, vocab, sound, key, last, head_ids + r * pitch, head_values + r * pitch, bits, block)
        tl.store(marks + 8 * r + 2, key.to(tl.int64))
        tl.store(marks + 8 * r + 3, last.to(tl.int64))


@triton.jit
def judge_kernel(
    logits, rows, laws, marks, masses, head_ids, head_values, sorted_ids, sorted_log_weights, vocab, stride, size,
    pitch: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """The law of a row, the target's token, and whether the draft token stands."""
    r = tl.program_id(0).to(tl.int64)
    position, draft = tl.load(rows + 8 * r + 1), tl.load(rows + 8 * r + 2)
    seed, committed, flags = tl.load(rows + 8 * r + 4), tl.load(rows + 8 * r + 5), tl.load(rows + 8 * r + 6)
    sound = tl.load(marks + 8 * r).to(tl.int32)
    token = tl.load(marks + 8 * r + 1)
    stands = (draft >= 0) & (draft == token)
    if (flags & 4) != 0:
        row = logits + tl.load(rows + 8 * r) * stride
        temperature, top_p, min_p = tl.load(laws + 4 * r), tl.load(laws + 4 * r + 1), tl.load(laws + 4 * r + 2)
        head_key, head_id = tl.load(marks + 8 * r + 2).to(tl.uint32), tl.load(marks + 8 * r + 3).to(tl.int32)
        lane = tl.arange(0, pitch)
        listed = lane < size
        ids = tl.load(head_ids + r * pitch + lane, mask=listed, other=0)
        values = tl.load(head_values + r * pitch + lane, mask=listed, other=float("-inf"))
        greatest = tl.max(values, 0)
        scale = scale_of(temperature)
        wide = greatest.to(tl.float64)
        log_weights = (values.to(tl.float64) - wide) / temperature
        weights = tl.where(listed, tl.exp(log_weights), 0.0)

        own_ids, own_values = head_ids + r * pitch, head_values + r * pitch
        rank, before = ranked(own_ids, own_values, ids, values, greatest, temperature, size, pitch, chunk)
        top_k = tl.load(rows + 8 * r + 3)
        limit = tl.where(top_k > 0, top_k, vocab)
        cut_key, cut_id = tl.cast(0, tl.uint32), tl.cast(vocab, tl.int32)
        if (limit > size) & (limit < vocab):
            cut_key, cut_id = cut_rest_by_rank(row, vocab, sound, limit, bits, block)
        rest = tl.cast(0.0, tl.float64)
        if limit > size:
            rest = rest_mass(row, vocab, sound, greatest, scale, head_key, head_id, cut_key, cut_id, bits, block)
        head = tl.sum(tl.where(listed & (rank < limit), weights, 0.0), 0)
        mass = head + rest
        reach = tl.where(top_p < 1.0, top_p * mass, float("inf"))
        stays = listed & (rank < limit) & (before < reach) & (weights >= min_p)
        if (tl.sum(stays.to(tl.int32), 0) < size) | (limit <= size):
            rest = tl.cast(0.0, tl.float64)
            least = tl.min(tl.where(stays, values, float("inf")), 0)
            cut_key = ordered(least, bits)
            cut_id = tl.max(tl.where(stays & (values == least), ids, -1), 0)
        else:
            if top_p < 1.0:
                target = top_p * mass - head
                if target > 0.0:
                    cut_key, cut_id = cut_rest_by_mass(
                        row, vocab, sound, greatest, scale, head_key, head_id, cut_key, cut_id, target, bits, block
                    )
                else:
                    cut_key, cut_id = head_key, head_id
            if min_p > 0.0:
                cut_key, cut_id = cut_rest_by_weight(
                    row, vocab, sound, greatest, scale, head_key, head_id, cut_key, cut_id, min_p, bits, block
                )
            if (top_p < 1.0) | (min_p > 0.0):
                rest = rest_mass(row, vocab, sound, greatest, scale, head_key, head_id, cut_key, cut_id, bits, block)
        log_weights = tl.where(stays, log_weights, float("-inf"))
        total = tl.sum(tl.where(stays, weights, 0.0), 0) + rest
        tl.store(marks + 8 * r + 4, cut_key.to(tl.int64))
        tl.store(marks + 8 * r + 5, cut_id.to(tl.int64))
        tl.store(masses + 3 * r, total)
        tl.store(masses + 3 * r + 1, wide)
        if (flags & 8) != 0:
            tl.store(sorted_ids + r * pitch + rank, ids.to(tl.int64), mask=listed)
            tl.store(sorted_log_weights + r * pitch + rank, log_weights, mask=listed)

        if (flags & 1) != 0:
            kind = tl.arange(0, 8)  # one number of each stream; the round's own are keyed by the committed length
            item = tl.where(kind >= 4, committed, 0)
            drawn = keyed_word(seed, item, position, kind)
            scores = tl.where(stays, log_weights + gumbel(keyed_word(seed, ids, position, 0)), float("-inf"))
            best = tl.max(scores, 0)
            first_rank = tl.min(tl.where(scores == best, rank, pitch), 0)
            token = tl.sum(tl.where(listed & (rank == first_rank), ids, 0), 0).to(tl.int64)
            if rest > 0.0:
                of_rest = tl.log(rest) + tl.sum(tl.where(kind == 1, gumbel(drawn), 0.0), 0)
                if of_rest > best:
                    aim = tl.sum(tl.where(kind == 2, uniform(drawn), 0.0), 0) * rest
                    token = pick_rest(
                        row, vocab, sound, greatest, scale, head_key, head_id, cut_key, cut_id, aim, bits, block
                    ).to(tl.int64)
            stands = (draft >= 0) & (draft == token)
            if (flags & 2) != 0:
                x = tl.load(row + draft).to(tl.float32)
                x = tl.where(sound == 0, 0.0, x)
                p = tl.exp((x.to(tl.float64) - wide) / temperature) / total
                p = tl.where(inside_cut(ordered(x, bits), draft.to(tl.int32), cut_key, cut_id), p, 0.0)
                tl.store(masses + 3 * r + 2, p)
    tl.store(marks + 8 * r + 6, token)
    tl.store(marks + 8 * r + 7, (stands & (sound != 0)).to(tl.int64))


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
    cut_key, cut_id = tl.load(marks + 8 * r + 4).to(tl.uint32), tl.load(marks + 8 * r + 5).to(tl.int32)
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
        if (tl.load(marks + 8 * r) == 0) | (at == count):
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
    x = logits_at(row, at, vocab, 1)
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
def walk_kernel(
    logits, rows, laws, marks, masses, requests, q_ids, q_shares, out, vocab, stride, q_pitch,
    reach: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
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
        stood = tl.load(marks + 8 * (first_row + lane) + 7, mask=lane < count, other=0)
        accepted = tl.min(tl.where(stood == 0, lane, reach), 0).to(tl.int64)
    r = first_row + accepted
    token, sound = tl.load(marks + 8 * r + 6), tl.load(marks + 8 * r)
    if tested & (accepted < count) & (sound != 0):
        row = logits + tl.load(rows + 8 * r) * stride
        cut_key, cut_id = tl.load(marks + 8 * r + 4).to(tl.uint32), tl.load(marks + 8 * r + 5).to(tl.int32)
        total, greatest = tl.load(masses + 3 * r), tl.load(masses + 3 * r + 1).to(tl.float32)
        scale = scale_of(tl.load(laws + 4 * r))
        ids, shares = q_ids + r * q_pitch, q_shares + r * q_pitch
        left = tl.cast(0.0, tl.float64)
        for first in range(0, vocab, block):
            at = first + tl.arange(0, block)
            w = _left(row, at, vocab, greatest, scale, cut_key, cut_id, total, kept, ids, shares, q_pitch, bits, chunk)
            left += tl.sum(w, 0)
        aim = tl.sum(_drawn(rows, r, tl.zeros((1,), tl.int64), 5), 0) * left
        picked, last = tl.cast(-1, tl.int32), tl.cast(-1, tl.int32)
        running = tl.cast(0.0, tl.float64)
        for first in range(0, vocab, block):
            if picked < 0:
                at = first + tl.arange(0, block)
                w = _left(
                    row, at, vocab, greatest, scale, cut_key, cut_id, total, kept, ids, shares, q_pitch, bits, chunk
                )
                found = tl.min(tl.where((running + tl.cumsum(w, 0) > aim) & (w > 0.0), at, vocab), 0)
                picked = tl.where(found < vocab, found, picked)
                last = tl.maximum(last, tl.max(tl.where(w > 0.0, at, -1), 0))
                running += tl.sum(w, 0)
        picked = tl.where(picked < 0, last, picked)
        # Where w p - q is nowhere positive the draft token fell by rounding: the coupled choice is as good.
        token = tl.where(picked < 0, token, picked.to(tl.int64))
    tl.store(out + 3 * n, accepted.to(tl.int64))
    tl.store(out + 3 * n + 1, token)
    tl.store(out + 3 * n + 2, sound)
