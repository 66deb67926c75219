"""Verification on the device: every row of every request at once.

`tile_kernel` reads all rows, many programs each, and leaves what is to be known of each tile of `tile` tokens;
`judge_kernel` finds a row's most likely tokens by it, chooses the target's token, and says whether that is the draft
token. `walk_triton` takes the rows together to requests. They exchange:

- `rows` (R, 8) int64: row of the logits, position, draft token or -1, top_k or 0, seed, committed length, flags, 0;
- `laws` (R, 4) float64: temperature, top_p, min_p, q of the draft token;
- `maxima`, `sums` (R, tiles) float32: of each tile the greatest logit, and the sum of weights relative to it;
- `broken` (R, programs a row) int32: whether a logit is NaN or infinitely great;
- `marks` (R, 5) int64: sound, the cut as key and id, token, stands;
- `masses` (R, 3) float64: total weight, greatest logit, p of a draft token on trial by rejection.

Of rows that are not sound nothing else is known. In coupled mode rows behind a request's first difference are judged
for nothing: the price of never asking the host in between. Noise is that of `services.verifier.verification`, number
for number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dspark.kernels.noise_triton import gumbel, keyed_word, uniform
from dspark.kernels.tiles_triton import fill_head, first_token
from dspark.kernels.top_triton import inside_cut, ordered, ranked
from services.verifier.kernels.law_triton import (
    cut_rest_by_mass,
    cut_rest_by_rank,
    cut_rest_by_weight,
    pick_rest,
    pick_rest_by_tile,
    rest_mass,
    rest_of_tiles,
    scale_of,
    weight,
)

__all__ = ["LAW", "REPORT", "SAMPLED", "TESTED", "judge_kernel", "tile_kernel"]

SAMPLED, TESTED, LAW, REPORT = 1, 2, 4, 8
"""Flags of a row: temperature > 0; a draft token on trial by rejection; its law is needed; its head is reported."""


@triton.jit
def tile_kernel(
    logits, rows, laws, maxima, sums, broken, vocab, stride, tiles, tile: tl.constexpr, block: tl.constexpr
):
    """`block` logits of a row: `maxima` and `broken`, and where its law is needed `sums`."""
    part, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = logits + tl.load(rows + 8 * r) * stride
    place = part * (block // tile) + tl.arange(0, block // tile)
    at = place[:, None] * tile + tl.arange(0, tile)[None, :]
    x = tl.load(row + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    wrong = ((x != x) | (x == float("inf"))).to(tl.int32)
    tl.store(broken + r * tl.num_programs(0) + part, tl.max(tl.max(wrong, 1), 0))
    top = tl.max(x, 1)
    tl.store(maxima + r * tiles + place, top, mask=place < tiles)
    if (tl.load(rows + 8 * r + 6) & 4) != 0:
        w = tl.where(x > float("-inf"), weight(x, top[:, None], scale_of(tl.load(laws + 4 * r))), 0.0)
        tl.store(sums + r * tiles + place, tl.sum(w, 1), mask=place < tiles)


@triton.jit
def judge_kernel(
    logits, rows, laws, maxima, sums, broken, marks, masses, taken, head_ids, head_values, sorted_ids,
    sorted_log_weights, vocab, stride, tiles, parts, size,
    pitch: tl.constexpr, bits: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, tile: tl.constexpr,
    tile_block: tl.constexpr, part_block: tl.constexpr,
):  # fmt: skip
    """The law of a row, the target's token, and whether the draft token stands."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + tl.load(rows + 8 * r) * stride
    position, draft = tl.load(rows + 8 * r + 1), tl.load(rows + 8 * r + 2)
    seed, committed, flags = tl.load(rows + 8 * r + 4), tl.load(rows + 8 * r + 5), tl.load(rows + 8 * r + 6)
    tops, weighed = maxima + r * tiles, sums + r * tiles
    part = tl.arange(0, part_block)
    wrong = tl.max(tl.load(broken + r * parts + part, mask=part < parts, other=0), 0)
    token = first_token(row, tops, vocab, tiles, bits, tile, tile_block).to(tl.int64)
    sound = (wrong == 0) & (tl.load(row + token).to(tl.float32) > float("-inf"))
    stands = (draft >= 0) & (draft == token)
    if ((flags & 4) != 0) & sound:
        temperature, top_p, min_p = tl.load(laws + 4 * r), tl.load(laws + 4 * r + 1), tl.load(laws + 4 * r + 2)
        own_tiles, own_ids, own_values = taken + r * pitch, head_ids + r * pitch, head_values + r * pitch
        head_key, head_id = fill_head(
            row, tops, vocab, tiles, size, own_tiles, own_ids, own_values, pitch, bits, tile, tile_block
        )
        lane = tl.arange(0, pitch)
        listed = lane < size
        ids = tl.load(own_ids + lane, mask=listed, other=0)
        values = tl.load(own_values + lane, mask=listed, other=float("-inf"))
        greatest = tl.max(values, 0)
        scale = scale_of(temperature)
        wide = greatest.to(tl.float64)
        log_weights = (values.to(tl.float64) - wide) / temperature
        weights = tl.where(listed, tl.exp(log_weights), 0.0)

        rank, before = ranked(own_ids, own_values, ids, values, greatest, temperature, size, pitch, chunk)
        top_k = tl.load(rows + 8 * r + 3)
        limit = tl.where(top_k > 0, top_k, vocab)
        cut_key, cut_id = tl.cast(0, tl.uint32), tl.cast(vocab, tl.int32)
        rest, uncut = tl.cast(0.0, tl.float64), limit >= vocab
        if limit > size:
            if uncut:
                rest = rest_of_tiles(
                    row, tops, weighed, own_tiles, vocab, tiles, size, greatest, scale, head_key, head_id,
                    pitch, bits, tile, tile_block,
                )  # fmt: skip
            else:
                cut_key, cut_id = cut_rest_by_rank(row, vocab, limit, bits, block)
                rest = rest_mass(row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits, block)
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
                        row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, target, bits, block
                    )
                else:
                    cut_key, cut_id = head_key, head_id
            if min_p > 0.0:
                cut_key, cut_id = cut_rest_by_weight(
                    row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, min_p, bits, block
                )
            if (top_p < 1.0) | (min_p > 0.0):
                uncut = uncut & (top_p >= 1.0) & (min_p <= 0.0)
                rest = rest_mass(row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, bits, block)
        log_weights = tl.where(stays, log_weights, float("-inf"))
        total = tl.sum(tl.where(stays, weights, 0.0), 0) + rest
        tl.store(marks + 5 * r + 1, cut_key.to(tl.int64))
        tl.store(marks + 5 * r + 2, cut_id.to(tl.int64))
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
                    if uncut:
                        picked = pick_rest_by_tile(
                            row, weighed, vocab, tiles, greatest, scale, head_key, head_id, aim, bits, tile, tile_block
                        )
                    else:
                        picked = pick_rest(
                            row, vocab, greatest, scale, head_key, head_id, cut_key, cut_id, aim, bits, block
                        )
                    token = tl.where(picked < 0, token, picked.to(tl.int64))
            stands = (draft >= 0) & (draft == token)
            if (flags & 2) != 0:
                x = tl.load(row + draft).to(tl.float32)
                p = tl.exp((x.to(tl.float64) - wide) / temperature) / total
                p = tl.where(inside_cut(ordered(x, bits), draft.to(tl.int32), cut_key, cut_id), p, 0.0)
                tl.store(masses + 3 * r + 2, p)
    tl.store(marks + 5 * r, sound.to(tl.int64))
    tl.store(marks + 5 * r + 3, token)
    tl.store(marks + 5 * r + 4, (stands & sound).to(tl.int64))
