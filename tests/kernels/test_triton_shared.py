"""What both services' models run on, in Triton: equal to the references, and bit-equal in any company."""

from typing import Any

import pytest
import torch
from support.paged import CPU, Pages, randn, wild

pytest.importorskip("triton")

from dspark.kernels import TORCH, noise, noise_triton
from dspark.kernels.attention import Span
from dspark.kernels.triton_kernels import TRITON

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TOLERANCES: dict[torch.dtype, Any] = {
    torch.float32: {"atol": 3e-5, "rtol": 1e-4},
    torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2},
}


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.cpu(), expected, **TOLERANCES[dtype])


# ---- rows


@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 24), (63, 72), (3, 1025)])
def test_norms(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x, y, w, v = randn(rows, width, dtype=dtype), randn(rows, width, seed=1, dtype=dtype), randn(width), randn(width)
    on = [t.to(device) for t in (x, y, w, v)]
    assert_close(TRITON.rms_norm(on[0], on[2], 1e-6), TORCH.rms_norm(x, w, 1e-6), dtype)
    for own, theirs in ((None, None), (v, on[3])):
        found, expected = TRITON.add_norm(*on[:3], 1e-6, theirs), TORCH.add_norm(x, y, w, 1e-6, own)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, dtype)


@DTYPES
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (9, 60)])
def test_rotary(device: torch.device, heads: int, dim: int, dtype: torch.dtype) -> None:
    x, w, angle = randn(7, heads + 2, dim, dtype=dtype), randn(heads, dim), randn(7, 1, dim // 2)
    part, cos, sin = x[:, :heads], angle.cos(), angle.sin()
    on = x.to(device)[:, :heads]
    turn = cos.to(device), sin.to(device)
    assert_close(TRITON.rotary(on, *turn), TORCH.rotary(part, cos, sin), dtype)
    found = TRITON.norm_rotary(on, w.to(device), 1e-6, *turn)
    assert_close(found, TORCH.norm_rotary(part, w, 1e-6, cos, sin), dtype)


@DTYPES
def test_rows_keep_their_bits(device: torch.device, dtype: torch.dtype) -> None:
    x, w = wild(40, 200, dtype=dtype).to(device), randn(200).to(device)
    gate, up = wild(70, 200, seed=2, dtype=dtype).to(device), wild(70, 200, seed=3, dtype=dtype).to(device)
    plain, gated = TRITON.linear(gate), TRITON.gated(gate, up, "silu")
    whole = [TRITON.rms_norm(x, w, 1e-6), plain(x), gated(x)]
    for start, count in ((0, 1), (39, 1), (3, 2), (5, 33)):
        rows = x[start : start + count]
        alone = [TRITON.rms_norm(rows, w, 1e-6), plain(rows), gated(rows)]
        assert all(torch.equal(a, b[start : start + count]) for a, b in zip(alone, whole, strict=True))


@DTYPES
@pytest.mark.parametrize(("rows", "ins", "outs"), [(1, 24, 17), (33, 130, 64)])
def test_linears(device: torch.device, rows: int, ins: int, outs: int, dtype: torch.dtype) -> None:
    x, gate, up = (randn(n, ins, seed=n, dtype=dtype) / ins**0.5 for n in (rows, outs, outs + 1))
    up = up[:outs]
    on, gate_on, up_on = x.to(device), gate.to(device), up.to(device)
    assert_close(TRITON.linear(gate_on)(on), TORCH.linear(gate)(x), dtype)
    for activation in ("silu", "gelu_tanh"):
        found = TRITON.gated(gate_on, up_on, activation)(on)
        assert_close(found, TORCH.gated(gate, up, activation)(x), dtype)


def test_no_rows(device: torch.device) -> None:
    nothing = torch.empty(0, 32, device=device)
    assert TRITON.linear(torch.ones(8, 32, device=device))(nothing).shape == (0, 8)
    assert TRITON.rms_norm(nothing, torch.ones(32, device=device), 1e-6).shape == (0, 32)


def test_noise_is_the_same_bits(device: torch.device) -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (5, 1), generator=torch.Generator().manual_seed(0))
    items = torch.cat((torch.arange(300), torch.tensor([2**32 - 1])))[None]
    positions, streams = torch.tensor([0, 1, 513, 131_071, 2**31])[:, None], torch.arange(5)[:, None]
    operands = (seeds, items, positions, streams)
    found = noise_triton.keyed_bits(*(t.to(device) for t in operands))
    assert torch.equal(found.cpu(), noise.keyed_bits(*operands))


# ---- attention


LENGTHS = ((0, 1), (0, 63), (15, 1), (16, 2), (511, 3), (700, 6), (1030, 1))
SHAPES = [(4, 1, 32, None), (4, 2, 60, 40), (3, 1, 16, 1), (2, 2, 64, 513)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), SHAPES)
@DTYPES
def test_paged_attention(
    device: torch.device, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    pages = Pages(LENGTHS, heads, kv_heads, dim, dtype)
    assert_close(pages.attend(TRITON, window, device), pages.attend(TORCH, window), dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 256), (40, 1, 16), (2, 2, 128)])
def test_heads_of_all_sizes(device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
    pages = Pages(((5, 2), (70, 1)), heads, kv_heads, dim, torch.float32)
    assert_close(pages.attend(TRITON, None, device), pages.attend(TORCH, None), torch.float32)


@pytest.mark.parametrize("window", [None, 100])
@DTYPES
def test_attention_keeps_bits(device: torch.device, window: int | None, dtype: torch.dtype) -> None:
    """A row alone, in its piece, in another piece, and among others: also across the edge of a split."""
    pages = Pages(((505, 12), (600, 4), (0, 20), (3, 1)), 4, 2, 24, dtype)
    whole = pages.attend(TRITON, window, device)
    for span in pages.spans:
        for first, count in {(0, span.count), (0, 1), (span.count - 1, 1), (span.count // 3, -(-span.count // 2))}:
            part = Span(0, span.start + first, count, span.pages)
            rows = slice(span.first_row + first, span.first_row + first + count)
            alone = pages.attend(TRITON, window, device, [part], rows)
            assert torch.equal(alone, whole[rows])


@DTYPES
def test_keys_and_values_go_to_their_pages(device: torch.device, dtype: torch.dtype) -> None:
    heads, kv_heads, dim = 5, 2, 20
    pages = Pages(((0, 1), (15, 18), (64, 3)), heads + 1, kv_heads, dim, dtype)
    rows = len(pages.q)
    qkv, w = randn(rows, heads + 1 + 2 * kv_heads, dim, dtype=dtype), randn(heads + 1 + kv_heads, dim)
    angle = randn(rows, 1, dim // 2)
    expected, found = pages.storage.clone(), pages.storage.to(device, copy=True)
    plan, own = pages.plan(TORCH, None, CPU), pages.plan(TRITON, None, device)
    q = TORCH.norm_rotary_write(qkv, w, 1e-6, angle.cos(), angle.sin(), expected, plan)
    on = [t.to(device) for t in (angle.cos(), angle.sin())]
    assert_close(TRITON.norm_rotary_write(qkv.to(device), w.to(device), 1e-6, *on, found, own), q, dtype)
    assert_close(found, expected, dtype)
    assert torch.equal(found.cpu()[kv_heads:], expected[kv_heads:])  # values are copied as they are
