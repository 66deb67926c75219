"""The sequential head in Triton: a whole block is launched at once, the host hears of it when it is drafted.

A step is three launches that hand over on the device. `_bias_kernel` gathers W_1[x_{k-1}] and adds its product with W_2
to the base logits, all blocks sharing each tile of W_2; `_head_kernel` finds each row's most likely tokens;
`_choose_kernel` filters, draws keyed noise, chooses, and takes the confidence. One launch a step would need every
program to wait for all others, or one program a block to read W_2 alone.

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
from dspark.kernels.parts_triton import INTERPRETED, block_of, narrow, product
from dspark.kernels.top_triton import gather_head, last_of_equals, logits_at, nth_key, ordered, ranked
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.models.drafters.heads import MarkovHead
from services.draft.drafting import Drafted
from services.draft.kernels.sequential import SequentialHead

__all__ = ["draft_tokens"]

_ROWS, _OUT, _IN = 16, 128, 64  # tiles of the bias product
_BLOCK = 4096 if INTERPRETED.value else 2048  # logits a program looks at in one go
_CHUNK = 32


@triton.jit
def _bias_kernel(
    base, w1, w1_rows, latent, w2, tokens, logits, batch, vocab, rank, base_stride,
    gathers: tl.constexpr, mapped: tl.constexpr, block_rows: tl.constexpr, block_out: tl.constexpr,
    block_in: tl.constexpr,
):  # fmt: skip
    """Logits = base + z · W_2ᵀ for some blocks and some of the vocabulary; z is W_1[x_{k-1}], or given as `latent`."""
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


@triton.jit
def _head_kernel(
    logits, rows, best, head_ids, head_values, vocab, size,
    pitch: tl.constexpr, bits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The most likely draft token of each row, and for those that sample the `size` most likely, in order of ids."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * vocab
    if tl.load(rows + 4 * r + 2) == 0:
        top, top_id = tl.cast(0, tl.uint32), tl.cast(0, tl.int32)
        for first in range(0, vocab, block):
            at = first + tl.arange(0, block)
            key = tl.where(at < vocab, ordered(logits_at(row, at, vocab, 1), bits), 0)
            greatest = tl.max(key, 0)
            if greatest > top:
                top = greatest
                top_id = tl.min(tl.where(key == greatest, at, vocab), 0)
        tl.store(best + r, top_id)
    else:
        key, need = nth_key(row, vocab, 1, size, bits, block)
        last = last_of_equals(row, vocab, 1, key, need, bits, block)
        gather_head(row, vocab, 1, key, last, head_ids + r * pitch, head_values + r * pitch, bits, block)


@triton.jit
def _choose_kernel(
    rows, laws, best, head_ids, head_values, d2t, tokens, w1, w1_rows, hidden, row_hidden, row_previous, row_bias,
    next_tokens, chosen, confidences, sparse_ids, sparse_shares, sparse_sizes, k, size, width, rank_width,
    hidden_stride,
    reduced: tl.constexpr, mapped: tl.constexpr, confident: tl.constexpr, knows_previous: tl.constexpr,
    pitch: tl.constexpr, chunk: tl.constexpr, block_hidden: tl.constexpr, block_rank: tl.constexpr,
):  # fmt: skip
    """One block's token. Rejection's distribution goes to `sparse_*`, most likely first.

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

    index = tl.load(best + r)
    if kind > 0:
        lane = tl.arange(0, pitch)
        listed = lane < size
        own_ids, own_values = head_ids + r * pitch, head_values + r * pitch
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
        index = tl.sum(tl.where(listed & (rank == winner), ids, 0), 0)
    token = index.to(tl.int64)
    if reduced:
        token += tl.load(d2t + index)
    tl.store(chosen + r, index.to(tl.int64))
    tl.store(next_tokens + r, token)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Of b blocks of n tokens: `tokens` (n + 1, b), anchors first; `logits` (n, b, V); the rest by step or block."""

    tokens: Tensor
    logits: Tensor
    chosen: Tensor
    confidences: Tensor
    sparse_ids: Tensor
    sparse_shares: Tensor
    sparse_sizes: Tensor
    best: Tensor
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
            logits=empty(n, b, vocab, dtype=torch.float32),
            chosen=empty(n, b, dtype=torch.int64),
            confidences=empty(n, b, dtype=torch.float32),
            sparse_ids=empty(*listed, dtype=torch.int64),
            sparse_shares=empty(*listed, dtype=torch.float64),
            sparse_sizes=empty(n, b, dtype=torch.int32),
            best=torch.zeros(b, dtype=torch.int32, device=device),
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
    shape = {"bits": 32, "block": min(_BLOCK, block_of(vocab))}
    mapped = w1_rows is not None
    _bias_kernel[(triton.cdiv(vocab, _OUT), triton.cdiv(b, _ROWS))](
        base[:, k], w1, w1_rows if mapped else tokens, w1 if latent is None else latent.contiguous(), w2, tokens,
        logits, b, vocab, rank, base.stride(0), gathers=latent is None, mapped=mapped, block_rows=_ROWS,
        block_out=_OUT, block_in=min(_IN, block_of(rank)),
    )  # fmt: skip
    _head_kernel[(b,)](
        logits, rows, buffers.best, buffers.head_ids, buffers.head_values, vocab, size, pitch=pitch, **shape,
        num_warps=8,
    )  # fmt: skip
    confidence, at = own.confidence, hidden[:, k]
    previous = None if confidence is None else confidence.previous
    _choose_kernel[(b,)](
        rows, laws, buffers.best, buffers.head_ids, buffers.head_values, tokens if own.d2t is None else own.d2t,
        tokens, w1, w1_rows if mapped else tokens, at, laws if confidence is None else confidence.hidden,
        laws if previous is None else previous, laws if confidence is None else confidence.bias,
        buffers.tokens[k + 1], buffers.chosen[k], buffers.confidences[k], buffers.sparse_ids[k],
        buffers.sparse_shares[k], buffers.sparse_sizes[k], k, size, at.shape[1], rank, at.stride(0),
        reduced=own.d2t is not None, mapped=mapped, confident=confidence is not None,
        knows_previous=previous is not None, pitch=pitch, chunk=_CHUNK, block_hidden=block_of(at.shape[1]),
        block_rank=block_of(rank),
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
        logits=buffers.logits.unbind(0),
        chosen=buffers.chosen.unbind(0),
    )
