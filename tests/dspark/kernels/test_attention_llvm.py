"""Compiled attention: equal to torch's on awkward shapes, and the same bits in any company."""

import math

import pytest
import torch
from support.paged import CPU, PAGE, Pages

from dspark.kernels import TORCH, attend_dots_llvm, attend_llvm, attention_llvm, team
from dspark.kernels.attend_llvm import Heads
from dspark.kernels.attention import AttentionPlan, Span
from dspark.kernels.attention_llvm import RowPlan

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

from dspark.kernels.llvm_kernels import LLVM

LENGTHS = ((0, 1), (0, 63), (15, 1), (16, 2), (511, 3), (700, 6), (1030, 1))
SHAPES = [
    (4, 1, 256, None),
    (4, 1, 256, 512),
    (1, 1, 32, 1),  # sees itself alone
    (4, 2, 60, 40),
    (3, 1, 16, 7),
    (2, 2, 64, 513),
    (7, 1, 40, None),
    (16, 2, 24, 100),
    (5, 5, 7, 17),  # no vector of two divides a head
]


def filled(pages: Pages, window: int | None, lanes: int | None = None, *, rounded: bool = False) -> torch.Tensor:
    """Attention into memory that reads as NaN, over pages whose unwritten places do too."""
    plan = pages.plan(LLVM, window, CPU)
    assert isinstance(plan, RowPlan)
    plan.rows.rooms.fill_(torch.nan)
    out = torch.full((len(pages.q), pages.heads * pages.dim), torch.nan)
    function = attend_llvm.compiled(Heads(pages.heads // pages.kv_heads, pages.dim, PAGE, rounded), lanes)
    storage = unwritten(pages).to(torch.bfloat16 if rounded else torch.float32)
    attention_llvm.attend(function, pages.q, storage, plan.rows, float(pages.dim**-0.5), out)
    return out


def unwritten(pages: Pages) -> torch.Tensor:
    """The pages with NaN wherever no position lies, and on nobody's page."""
    kept = torch.zeros(pages.storage.shape[1] * PAGE, dtype=torch.bool)
    for span in pages.spans:
        for position in range(span.start + span.count):
            kept[span.pages[position // PAGE] * PAGE + position % PAGE] = True
    rows = pages.storage.view(len(pages.storage), -1, pages.dim)
    return rows.masked_fill(~kept[:, None], torch.nan).view_as(pages.storage)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), SHAPES)
def test_equal_to_torch(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    pages = Pages(LENGTHS, heads, kv_heads, dim, torch.float32)
    expected = pages.attend(TORCH, window)
    for lanes in (None, 16, 4):
        torch.testing.assert_close(filled(pages, window, lanes), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(filled(pages, window), pages.attend(LLVM, window))
    assert torch.equal(pages.plan(LLVM, window, CPU).slots, pages.plan(TORCH, window, CPU).slots)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), SHAPES)
def test_keys_and_values_in_bfloat16_are_read_as_they_are(
    heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    pages = Pages(LENGTHS, heads, kv_heads, dim, torch.float32)
    pages.storage = pages.storage.bfloat16().float()
    for lanes in (None, 16, 4):
        assert torch.equal(filled(pages, window, lanes, rounded=True), filled(pages, window, lanes))
    expected = pages.attend(LLVM, window)
    pages.storage = pages.storage.bfloat16()
    if not attend_dots_llvm.fits(Heads(heads // kv_heads, dim, PAGE, rounded=True)):
        assert torch.equal(pages.attend(LLVM, window), expected)


def paired(pages: Pages, window: int | None) -> torch.Tensor:
    """Queries, and powers of e before they are divided by their sum, rounded to bfloat16; sums in float64."""
    out = torch.empty(len(pages.q), pages.heads, pages.dim, dtype=torch.float64)
    group = pages.heads // pages.kv_heads
    for span in pages.spans:
        for index in range(span.count):
            row, last = span.first_row + index, span.start + index
            seen = torch.arange(max(0, last + 1 - (window or last + 1)), last + 1)
            at = torch.tensor(span.pages)[seen // PAGE] * PAGE + seen % PAGE
            both = pages.storage.view(2 * pages.kv_heads, -1, pages.dim)[:, at].double()
            for head in range(pages.heads):
                key, value = both[head // group], both[pages.kv_heads + head // group]
                scores = key @ pages.q[row, head].bfloat16().double() * pages.dim**-0.5
                weights = (scores - scores.max()).exp().bfloat16().double()
                out[row, head] = weights @ value / weights.sum()
    return out.flatten(1).float()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window"),
    [
        (4, 1, 256, None),
        (4, 1, 256, 512),
        (1, 1, 32, 1),
        (2, 2, 64, 513),
        (3, 1, 96, 7),
        (16, 2, 128, 100),
        (5, 5, 64, 17),
        (7, 1, 32, 30),
    ],
)
def test_pairs_of_bfloat16(heads: int, kv_heads: int, dim: int, window: int | None) -> None:
    """Into memory that reads as NaN, over pages whose unwritten places do too, also beside what is seen."""
    own = Heads(heads // kv_heads, dim, PAGE, rounded=True)
    if not attend_dots_llvm.fits(own):
        pytest.skip("no AVX512-BF16 instructions here")
    pages = Pages(LENGTHS, heads, kv_heads, dim, torch.float32)
    pages.storage = pages.storage.bfloat16().float()
    expected = paired(pages, window)
    plan = pages.plan(LLVM, window, CPU)
    assert isinstance(plan, RowPlan)
    plan.rows.rooms.fill_(torch.nan)
    out = torch.full((len(pages.q), heads * dim), torch.nan)
    function = attend_dots_llvm.compiled(own)
    attention_llvm.attend(function, pages.q, unwritten(pages).bfloat16(), plan.rows, float(dim**-0.5), out)
    # A power of e at the edge between two bfloat16s is rounded to either: a 256th of one weight.
    assert float((out - expected).abs().max()) < 4e-3
    assert float((out - expected).pow(2).mean().sqrt()) < 1e-4
    pages.storage = pages.storage.bfloat16()
    assert torch.equal(out, pages.attend(LLVM, window))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dim", "kept"), [(24, torch.float32), (32, torch.bfloat16)])
def test_rows_keep_their_bits(window: int | None, threads: int, dim: int, kept: torch.dtype) -> None:
    """A row alone, in its piece, in another piece, and among others, whoever computes it."""
    pages = Pages(((505, 12), (600, 4), (0, 20), (3, 1)), 4, 2, dim, torch.float32)
    pages.storage = pages.storage.to(kept)
    whole = pages.attend(LLVM, window)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for span in pages.spans:
            for first, count in {(0, span.count), (0, 1), (span.count - 1, 1), (span.count // 3, -(-span.count // 2))}:
                part = Span(0, span.start + first, count, span.pages)
                rows = slice(span.first_row + first, span.first_row + first + count)
                assert torch.equal(pages.attend(LLVM, window, spans=[part], rows=rows), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_scores_of_any_size() -> None:
    """The softmax neither overflows nor loses the only key that counts."""
    pages = Pages(((40, 2),), 4, 1, 32, torch.float32)
    for scale in (1e-20, 1.0, 1e4):
        found, expected = (
            kernels.paged_attention(pages.q, pages.storage, pages.plan(kernels, None, CPU), scale)
            for kernels in (LLVM, TORCH)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows_where_it_is_seen(kept: torch.dtype) -> None:
    """And nowhere else: a broken key, also where the value behind it is sound."""
    for broken in (torch.nan, torch.inf):
        pages = Pages(((30, 3), (20, 2)), 4, 2, 32, torch.float32)
        pages.storage = pages.storage.to(kept)
        span = pages.spans[0]
        pages.storage.view(4, -1, 32)[1, span.pages[1] * PAGE + 31 - PAGE, 5] = broken  # position 31, second key head
        found = pages.attend(LLVM, None)
        seen = torch.zeros(5, 4, dtype=torch.bool)
        seen[1:3, 2:] = True  # rows at 31 and 32, the heads of that key
        # An infinite score of either sign: +inf is not finite, -inf is a key that is not seen.
        sign = torch.ones(5, 4) if math.isnan(broken) else pages.q[..., 5].sign()
        shown = ~found.view(5, 4, 32).isfinite().all(-1)
        assert torch.equal(shown, seen & (sign > 0))


def test_bfloat16_stays_with_torch() -> None:
    pages = Pages(((5, 2),), 2, 1, 32, torch.bfloat16)
    assert isinstance(pages.plan(LLVM, None, CPU), AttentionPlan)
    assert torch.equal(pages.attend(LLVM, None), pages.attend(TORCH, None))
