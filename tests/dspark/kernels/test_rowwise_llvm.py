"""Compiled norms, rotary embedding and activations: equal to torch's, and the same bits in any company."""

import math
from typing import Any

import pytest
import torch
from support.paged import CPU, Pages, randn, wild
from torch.nn import functional

from dspark.kernels import TORCH, rowwise_llvm, team

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

from dspark.kernels.llvm_kernels import LLVM

EPS = 1e-6
CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def nothing_is_there_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to reads as NaN."""
    like, new = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda x: like(x).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size: new(x, *size).fill_(torch.nan))


@pytest.mark.parametrize(("rows", "width"), [(1, 24), (63, 72), (3, 1025), (300, 640)])
def test_norms(rows: int, width: int) -> None:
    x, y, w, v = wild(rows, width), wild(rows, width, seed=1), randn(width), randn(width, seed=2)
    torch.testing.assert_close(LLVM.rms_norm(x, w, EPS), TORCH.rms_norm(x, w, EPS), **CLOSE)
    for own in (None, v):
        for found, expected in zip(LLVM.add_norm(x, y, w, EPS, own), TORCH.add_norm(x, y, w, EPS, own), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)


def test_rows_that_do_not_lie_one_behind_another() -> None:
    x, w = wild(9, 128), randn(64)
    assert torch.equal(LLVM.rms_norm(x[:, ::2], w, EPS), LLVM.rms_norm(x[:, ::2].contiguous(), w, EPS))
    assert torch.equal(LLVM.rms_norm(x.view(3, 3, 128)[..., :64], w, EPS).view(9, 64), LLVM.rms_norm(x[:, :64], w, EPS))


def test_rows_keep_their_bits() -> None:
    x, w = wild(300, 200), randn(200)
    gated = LLVM.gated(wild(70, 200, seed=2), wild(70, 200, seed=3), "silu")
    whole = [LLVM.rms_norm(x, w, EPS), gated(x), LLVM.add_norm(x, x, w, EPS, w)[1]]
    for start, count in ((0, 1), (299, 1), (3, 2), (5, 133)):
        rows = x[start : start + count]
        alone = [LLVM.rms_norm(rows, w, EPS), gated(rows), LLVM.add_norm(rows, rows, w, EPS, w)[1]]
        assert all(torch.equal(a, b[start : start + count]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 5, 256), (63, 3, 20), (7, 1, 14), (150, 5, 64)])
def test_heads_are_normed_and_turned(rows: int, heads: int, dim: int) -> None:
    wide, w, angle = wild(rows, heads + 2, dim), randn(heads, dim), randn(rows, 1, dim // 2)
    turn = angle.cos(), angle.sin()
    for x in (wide[:, :heads], wide[:, 2:], wide[:, :heads].contiguous(), wide.transpose(0, 1)[:heads].transpose(0, 1)):
        found = LLVM.norm_rotary(x, w, EPS, *turn)
        torch.testing.assert_close(found, TORCH.norm_rotary(x, w, EPS, *turn), **CLOSE)
    flipped = wide[:, :heads].transpose(1, 2).contiguous().transpose(1, 2)  # numbers of a head lie apart
    torch.testing.assert_close(
        LLVM.norm_rotary(flipped, w, EPS, *turn), TORCH.norm_rotary(flipped, w, EPS, *turn), **CLOSE
    )
    whole = LLVM.norm_rotary(wide[:, :heads], w, EPS, *turn)
    alone = LLVM.norm_rotary(wide[-1:, :heads], w, EPS, turn[0][-1:], turn[1][-1:])
    assert torch.equal(alone, whole[-1:])


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 256), (5, 2, 20), (1, 1, 14)])
def test_keys_and_values_go_to_their_pages(heads: int, kv_heads: int, dim: int) -> None:
    pages = Pages(((0, 1), (15, 18), (64, 3)), heads * kv_heads, kv_heads, dim, torch.float32)
    rows = len(pages.q)
    qkv, w = wild(rows, (heads + 2) * kv_heads, dim), randn((heads + 1) * kv_heads, dim)
    angle = randn(rows, 1, dim // 2)
    expected, found = pages.storage.clone(), pages.storage.clone()
    turn = angle.cos(), angle.sin()
    q = LLVM.norm_rotary_write(qkv, w, EPS, *turn, found, pages.plan(LLVM, None, CPU))
    plain = TORCH.norm_rotary_write(qkv, w, EPS, *turn, expected, pages.plan(TORCH, None, CPU))
    torch.testing.assert_close(q, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[kv_heads:], expected[kv_heads:])  # values are copied as they are


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 1, 256), (5, 2, 20), (1, 1, 14)])
def test_keys_and_values_are_rounded_to_pages_in_bfloat16(heads: int, kv_heads: int, dim: int) -> None:
    pages = Pages(((0, 1), (15, 18), (64, 3)), heads * kv_heads, kv_heads, dim, torch.float32)
    rows = len(pages.q)
    qkv, w = wild(rows, (heads + 2) * kv_heads, dim), randn((heads + 1) * kv_heads, dim)
    odd = torch.tensor(
        [0.0, -0.0, 1e-40, 3.4e38, torch.inf, -torch.inf, torch.nan, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9]
    )
    qkv[0, -1, : len(odd)] = odd  # a value's: halfway cases, and what rounds to infinity
    angle = randn(rows, 1, dim // 2)
    turn, plan = (angle.cos(), angle.sin()), pages.plan(LLVM, None, CPU)
    exact, found = pages.storage.clone(), pages.storage.bfloat16()
    q = LLVM.norm_rotary_write(qkv, w, EPS, *turn, exact, plan)
    assert torch.equal(LLVM.norm_rotary_write(qkv, w, EPS, *turn, found, plan), q)
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_activations_of_all_sizes(activation: str) -> None:
    gate = torch.cat(
        (torch.linspace(-30, 30, 4001), torch.tensor([-1e30, -1e4, -100, 100, 1e4, 1e30, 0.0, -0.0, 1e-30]))
    )
    both = torch.stack((gate, torch.full_like(gate, 2.0))).view(1, -1)
    found = rowwise_llvm.activated(both, len(gate), activation)[0]
    wide = gate.double()
    exact = 2 * (functional.gelu(wide, approximate="tanh") if activation == "gelu_tanh" else functional.silu(wide))
    torch.testing.assert_close(found, exact.float(), atol=1e-6, rtol=2e-6)


def test_exp_is_within_two_units() -> None:
    """Through silu: x / (1 + exp(-x)) at x = -5 … -60 is x · exp(x) but for a rounding."""
    gate = -torch.linspace(5, 60, 2003)
    both = torch.stack((gate, torch.ones_like(gate))).view(1, -1)
    found = rowwise_llvm.activated(both, len(gate), "silu")[0].double()
    exact = gate.double() / (1 + torch.exp(-gate.double()))
    assert ((found - exact).abs() / exact.abs()).max() < 4 * math.ldexp(1, -23)


def test_bfloat16_stays_with_torch() -> None:
    x, w = wild(3, 64).bfloat16(), randn(64)
    assert torch.equal(LLVM.rms_norm(x, w, EPS), TORCH.rms_norm(x, w, EPS))
    assert all(
        torch.equal(a, b) for a, b in zip(LLVM.add_norm(x, x, w, EPS), TORCH.add_norm(x, x, w, EPS), strict=True)
    )
