"""The sequential head in Triton: a whole block is launched at once, the host hears of it when it is drafted.

A step is two launches that hand over on the device. `_bias_kernel` gathers W_1[x_{k-1}] and adds its product with W_2
to the base logits, all blocks sharing each tile of W_2, and leaves each tile's greatest logit; with those
`_choose_kernel` finds the most likely tokens in a few tiles of its row, filters, draws keyed noise, chooses, and takes
the confidence. One launch a step would need every program to wait for all others, or one program a block to read W_2
alone.

A gated or recurrent head's latent is three small products a step, which torch launches between the kernels: nothing in
them is worth a kernel of their own, and nothing there waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark.kernels.noise import signed_seed
from dspark.kernels.noise_triton import gumbel, keyed_word, uniform
from dspark.kernels.parts_triton import block_of, narrow, product
from dspark.kernels.tiles_triton import fill_head, first_token
from dspark.kernels.top_triton import ranked
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.models.drafters.heads import MarkovHead
from services.draft.drafting import Drafted
from services.draft.kernels.sequential import SequentialHead

__all__ = ["draft_tokens"]

_ROWS, _OUT, _IN = 16, 128, 64  # tiles of the bias product
_CHUNK = 32


@triton.jit
def _bias_kernel(
    base, w1, w1_rows, latent, w2, tokens, logits, maxima, batch, vocab, rank, base_stride,
    gathers: tl.constexpr, mapped: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr,
    block_in: tl.constexpr,
):  # fmt: skip
    """Logits = base + z · W_2ᵀ for some blocks and a tile of the vocabulary, and its greatest to `maxima` (b, tiles).

    z is W_1[x_{k-1}], or given as `latent`.
    """
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    column = tl.program_id(0) * block_out + tl.arange(0, block_out)
    here = row < batch
    source = latent + row.to(tl.int64) * rank
    if gathers:
        token = tl.load(tokens + row, mask=here, other=0)
        if mapped:
            token = tl.load(w1_rows + token, mask=here, other=0)
        source = w1 + token.to(tl.int64) * rank
    acc = tl.zeros((block_rows, block_out), tl.float32)
    for first in range(0, rank, block_in):
        k = first + tl.arange(0, block_in)
        z = tl.load(source[:, None] + k[None, :], mask=here[:, None] & (k < rank)[None, :], other=0.0)
        inside = (k < rank)[:, None] & (column < vocab)[None, :]
        w = tl.load(w2 + column.to(tl.int64)[None, :] * rank + k[:, None], mask=inside, other=0.0)
        acc = product(z, w, acc)
    inside = here[:, None] & (column < vocab)[None, :]
    u = tl.load(base + row.to(tl.int64)[:, None] * base_stride + column[None, :], mask=inside, other=0.0)
    u += narrow(acc, w2.dtype.element_ty).to(tl.float32)
    tl.store(logits + row.to(tl.int64)[:, None] * vocab + column[None, :], u, mask=inside)
    greatest = tl.max(tl.where(inside, u, float("-inf")), 1)
    tl.store(maxima + row * tl.num_programs(0) + tl.program_id(0), greatest, mask=here)


@triton.jit
def _choose_kernel(
    logits, maxima, rows, laws, taken, head_ids, head_values, d2t, tokens, w1, w1_rows, hidden, row_hidden,
    row_previous, row_bias, next_tokens, others, chosen, confidences, sparse_ids, sparse_shares, sparse_sizes, k, vocab,
    tiles, size, width, rank_width, hidden_stride,
    reduced: tl.constexpr, mapped: tl.constexpr, confident: tl.constexpr, knows_previous: tl.constexpr,
    pitch: tl.constexpr, chunk: tl.constexpr, block_hidden: tl.constexpr, block_rank: tl.constexpr,
    tile: tl.constexpr, tile_block: tl.constexpr,
):  # fmt: skip
    """One block's token, and in coupled mode what it would be next. Rejection's distribution goes to `sparse_*`.

    The distribution is listed most likely first.

    `rows` (b, 4) int64: committed length, seed, kind (0 greedy, 1 coupled, 2 rejection), top_k; `laws` (b, 3) float64:
    temperature, top_p, min_p.
    """
    r = tl.program_id(0).to(tl.int64)
    committed, seed = tl.load(rows + 4 * r), tl.load(rows + 4 * r + 1)
    kind, top_k = tl.load(rows + 4 * r + 2), tl.load(rows + 4 * r + 3)
    if confident:
        at = tl.arange(0, block_hidden)
        h = tl.load(hidden + r * hidden_stride + at, mask=at < width, other=0.0).to(tl.float32)
        c = tl.sum(h * tl.load(row_hidden + at, mask=at < width, other=0.0), 0) + tl.load(row_bias)
        if knows_previous:
            token = tl.load(tokens + r)
            if mapped:
                token = tl.load(w1_rows + token)
            at = tl.arange(0, block_rank)
            z = tl.load(w1 + token.to(tl.int64) * rank_width + at, mask=at < rank_width, other=0.0).to(tl.float32)
            c += tl.sum(z * tl.load(row_previous + at, mask=at < rank_width, other=0.0), 0)
        tl.store(confidences + r, c)

    row, tops = logits + r * vocab, maxima + r * tiles
    index, other = tl.cast(0, tl.int32), tl.cast(-1, tl.int32)
    if kind == 0:
        index = first_token(row, tops, vocab, tiles, 32, tile, tile_block)
    else:
        own_ids, own_values = head_ids + r * pitch, head_values + r * pitch
        fill_head(row, tops, vocab, tiles, size, taken + r * pitch, own_ids, own_values, pitch, 32, tile, tile_block)
        lane = tl.arange(0, pitch)
        listed = lane < size
        ids = tl.load(own_ids + lane, mask=listed, other=0)
        values = tl.load(own_values + lane, mask=listed, other=float("-inf"))
        greatest = tl.max(values, 0)
        temperature = tl.load(laws + 3 * r)
        log_weights = (values.to(tl.float64) - greatest.to(tl.float64)) / temperature
        weights = tl.where(listed, tl.exp(log_weights), 0.0)
        rank, before = ranked(own_ids, own_values, ids, values, greatest, temperature, size, pitch, chunk)
        limit = tl.where(top_k > 0, top_k, size)
        mass = tl.sum(tl.where(listed & (rank < limit), weights, 0.0), 0)
        top_p = tl.load(laws + 3 * r + 1)
        reach = tl.where(top_p < 1.0, top_p * mass, float("inf"))
        stays = listed & (rank < limit) & (before < reach) & (weights >= tl.load(laws + 3 * r + 2))
        targets = ids.to(tl.int64)
        if reduced:
            targets += tl.load(d2t + ids, mask=listed, other=0)
        position = committed + k
        if kind == 1:
            scores = tl.where(stays, log_weights + gumbel(keyed_word(seed, targets, position, 0)), float("-inf"))
            winner = tl.min(tl.where(scores == tl.max(scores, 0), rank, pitch), 0)
            scores = tl.where(rank == winner, float("-inf"), scores)
            best = tl.max(scores, 0)
            behind = tl.min(tl.where(scores == best, rank, pitch), 0)
            behind = tl.where(best > float("-inf"), behind, pitch)
            other = tl.max(tl.where(listed & (rank == behind), ids, -1), 0)
        else:
            total = tl.sum(tl.where(stays, weights, 0.0), 0)
            u = tl.max(uniform(keyed_word(seed, tl.zeros((pitch,), tl.int64) + committed, position, 3)), 0)
            passed = stays & (before + weights > u * total)
            kept = tl.sum(stays.to(tl.int32), 0)
            winner = tl.minimum(tl.min(tl.where(passed, rank, pitch), 0), kept - 1)
            place = r * pitch + rank
            tl.store(sparse_ids + place, targets, mask=stays)
            tl.store(sparse_shares + place, weights / total, mask=stays)
            tl.store(sparse_sizes + r, kept)
        index = tl.max(tl.where(listed & (rank == winner), ids, 0), 0)  # all are of rank 0 where logits are no numbers
    token = index.to(tl.int64)
    if reduced:
        token += tl.load(d2t + index)
    other = tl.where(other < 0, index, other)
    second = other.to(tl.int64)
    if reduced:
        second += tl.load(d2t + other)
    tl.store(others + r, second)
    tl.store(chosen + r, index.to(tl.int64))
    tl.store(next_tokens + r, token)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Of b blocks of n tokens: `tokens` (n + 1, b), anchors first; `logits` (n, b, V); the rest by step or block."""

    tokens: Tensor
    others: Tensor
    logits: Tensor
    chosen: Tensor
    confidences: Tensor
    sparse_ids: Tensor
    sparse_shares: Tensor
    sparse_sizes: Tensor
    maxima: Tensor
    taken: Tensor
    head_ids: Tensor
    head_values: Tensor

    @classmethod
    def of(cls, anchors: Sequence[int], base: Tensor, pitch: int, *, sparse: bool) -> _Buffers:
        (b, n, vocab), device = base.shape, base.device
        listed = (n, b, pitch) if sparse else (n, 1, 1)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        tokens = empty(n + 1, b, dtype=torch.int64)
        tokens[0] = torch.tensor(anchors)
        return cls(
            tokens=tokens,
            others=empty(n, b, dtype=torch.int64),
            logits=empty(n, b, vocab, dtype=torch.float32),
            chosen=empty(n, b, dtype=torch.int64),
            confidences=empty(n, b, dtype=torch.float32),
            sparse_ids=empty(*listed, dtype=torch.int64),
            sparse_shares=empty(*listed, dtype=torch.float64),
            sparse_sizes=empty(n, b, dtype=torch.int32),
            maxima=empty(b, triton.cdiv(vocab, _OUT), dtype=torch.float32),
            taken=empty(b, pitch, dtype=torch.int32),
            head_ids=empty(b, pitch, dtype=torch.int32),
            head_values=empty(b, pitch, dtype=torch.float32),
        )


@torch.inference_mode()
def draft_tokens(
    own: SequentialHead,
    base: Tensor,
    hidden: Tensor,
    anchors: Sequence[int],
    committed_lens: Sequence[int],
    samplings: Sequence[Sampling],
) -> Drafted:
    """As `sequential.draft_tokens`; equal logits by lower draft index, which the reference leaves open."""
    size = min(own.chooser.top_k, base.shape[2])
    kinds = [_kind(sampling) for sampling in samplings]
    buffers = _Buffers.of(anchors, base, block_of(size), sparse=2 in kinds)
    rows = torch.tensor(
        [(n, signed_seed(s.seed), kind, s.top_k) for n, s, kind in zip(committed_lens, samplings, kinds, strict=True)],
        dtype=torch.int64,
    ).to(base.device)
    laws = torch.tensor([(s.temperature or 1.0, s.top_p, s.min_p) for s in samplings], dtype=torch.float64)
    laws = laws.to(base.device)
    state = own.head.initial_state(len(anchors))
    for k in range(hidden.shape[1]):
        latent = None
        if type(own.head) is not MarkovHead:
            previous = own.head.previous(buffers.tokens[k])
            latent, state = own.head.latent(state, previous, hidden[:, k])
        _step(own, base, hidden, latent, rows, laws, buffers, k, size)
    return _drafted(own, buffers, kinds)


def _kind(sampling: Sampling) -> int:
    if sampling.greedy:
        return 0
    return 2 if sampling.mode is Mode.REJECTION else 1


def _step(
    own: SequentialHead,
    base: Tensor,
    hidden: Tensor,
    latent: Tensor | None,
    rows: Tensor,
    laws: Tensor,
    buffers: _Buffers,
    k: int,
    size: int,
) -> None:
    """Launch one step; nothing here waits."""
    b, _, vocab = base.shape
    w1, w2 = own.head.markov_w1.weight, own.head.markov_w2.weight
    w1_rows, rank, pitch = own.head.rows, w1.shape[1], buffers.head_ids.shape[1]
    tokens, logits = buffers.tokens[k], buffers.logits[k]
    tiles = buffers.maxima.shape[1]
    mapped = w1_rows is not None
    _bias_kernel[(tiles, triton.cdiv(b, _ROWS))](
        base[:, k], w1, w1_rows if mapped else tokens, w1 if latent is None else latent.contiguous(), w2, tokens,
        logits, buffers.maxima, b, vocab, rank, base.stride(0), gathers=latent is None, mapped=mapped,
        block_rows=_ROWS, block_out=_OUT, block_in=min(_IN, block_of(rank)),
    )  # fmt: skip
    confidence, at = own.confidence, hidden[:, k]
    previous = None if confidence is None else confidence.previous
    _choose_kernel[(b,)](
        logits, buffers.maxima, rows, laws, buffers.taken, buffers.head_ids, buffers.head_values,
        tokens if own.d2t is None else own.d2t, tokens, w1, w1_rows if mapped else tokens, at,
        laws if confidence is None else confidence.hidden, laws if previous is None else previous,
        laws if confidence is None else confidence.bias, buffers.tokens[k + 1], buffers.others[k], buffers.chosen[k],
        buffers.confidences[k], buffers.sparse_ids[k], buffers.sparse_shares[k], buffers.sparse_sizes[k], k, vocab,
        tiles, size, at.shape[1], rank, at.stride(0),
        reduced=own.d2t is not None, mapped=mapped, confident=confidence is not None,
        knows_previous=previous is not None, pitch=pitch, chunk=_CHUNK, block_hidden=block_of(at.shape[1]),
        block_rank=block_of(rank), tile=_OUT, tile_block=block_of(tiles), num_warps=16,
    )  # fmt: skip


def _drafted(own: SequentialHead, buffers: _Buffers, kinds: Sequence[int]) -> Drafted:
    """What came of it; with rejection among the modes, this is where the host waits."""
    n = len(buffers.chosen)
    distributions: list[list[SparseDistribution | None]] = [[None] * len(kinds) for _ in range(n)]
    if 2 in kinds:
        listed = (buffers.sparse_ids, buffers.sparse_shares, buffers.sparse_sizes)
        for k, step in enumerate(zip(*(part.tolist() for part in listed), strict=True)):
            for r, (ids, shares, size) in enumerate(zip(*step, strict=True)):
                if kinds[r] == 2:
                    distributions[k][r] = SparseDistribution(tuple(ids[:size]), tuple(shares[:size]))
    return Drafted(
        tokens=buffers.tokens[1:].T,
        distributions=distributions,
        confidence_logits=buffers.confidences.T if own.confidence is not None else None,
        others=buffers.others.T,
        logits=buffers.logits.unbind(0),
        chosen=buffers.chosen.unbind(0),
    )
