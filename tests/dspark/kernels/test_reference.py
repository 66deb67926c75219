"""Row-wise kernels against their definitions, and their bits in any batch."""

import math

import pytest
import torch

from dspark.errors import ConfigError
from dspark.kernels import TORCH, linear_llvm, select_kernels, team
from dspark.kernels.reference import norm_rotary, rms_norm, rotary

DTYPES = (torch.bfloat16, torch.float32)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    turn = torch.arange(rows)[:, None, None] / 10_000 ** (torch.arange(0, dim, 2) / dim)
    return turn.cos(), turn.sin()


def test_rms_norm() -> None:
    x, weight = randn(5, 64), randn(64, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert torch.allclose(rms_norm(x, weight, 1e-6), expected, atol=1e-6)
    assert rms_norm(x.bfloat16(), weight, 1e-6).dtype == torch.bfloat16


def test_rotary_turns_pairs_by_their_angle() -> None:
    x = randn(6, 2, 8)
    cos, sin = angles(6, 8)
    turned = rotary(x, cos, sin)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)
    assert torch.allclose(turned, torch.cat((pairs.real, pairs.imag), -1), atol=1e-6)
    assert torch.equal(turned[0], x[0])  # position 0
    assert math.isclose(turned.norm().item(), x.norm().item(), rel_tol=1e-5)


def test_norm_rotary_is_both() -> None:
    x, weight = randn(6, 3, 8), randn(3, 8, seed=1)
    cos, sin = angles(6, 8)
    assert torch.allclose(
        norm_rotary(x, weight, 1e-6, cos, sin), rotary(rms_norm(x, weight, 1e-6), cos, sin), atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 64, 640, 2560])
def test_rows_keep_their_bits(width: int, dtype: torch.dtype) -> None:
    x, weight = (randn(300, width) * randn(300, width, seed=1) ** 3).to(dtype), randn(width, seed=2)
    whole = rms_norm(x, weight, 1e-6)
    heads, cos, sin = x.view(300, 2, -1), *angles(300, width // 2)
    turned = norm_rotary(heads, weight.view(2, -1), 1e-6, cos, sin)
    for start, count in ((0, 1), (7, 1), (299, 1), (3, 2), (100, 5), (1, 63), (44, 256)):
        rows = slice(start, start + count)
        assert torch.equal(rms_norm(x[rows], weight, 1e-6), whole[rows])
        assert torch.equal(norm_rotary(heads[rows], weight.view(2, -1), 1e-6, cos[rows], sin[rows]), turned[rows])


def test_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert select_kernels("torch", cpu) is TORCH
    if team.available():
        assert select_kernels("auto", cpu) is select_kernels("llvm", cpu)
        assert select_kernels("llvm", cpu).linear is linear_llvm.linear
    with pytest.raises(
        ConfigError, match="triton: device cpu has none; they need a CUDA device, or TRITON_INTERPRET=1"
    ):
        select_kernels("triton", cpu)
    with pytest.raises(ConfigError, match="'cuda' is not one of auto, torch, llvm, triton"):
        select_kernels("cuda", cpu)


def test_what_is_not_installed_runs_only_where_it_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    card, cpu = torch.device("cuda"), torch.device("cpu")
    assert select_kernels("auto", card) is select_kernels("auto", cpu) is TORCH
    with pytest.raises(ConfigError, match="llvm: the package llvmlite is not installed"):
        select_kernels("llvm", cpu)
    with pytest.raises(ConfigError, match="llvm: its code is a processor's, not a cuda device's"):
        select_kernels("llvm", card)
    with pytest.raises(ConfigError, match="the package triton is not installed"):
        select_kernels("triton", card)


def test_a_residual_sum_with_its_norm_is_both() -> None:
    x, y, weight, own = randn(5, 24).bfloat16(), randn(5, 24, seed=1).bfloat16(), randn(24, seed=2), randn(24, seed=3)
    for added, y_weight in ((y, None), (rms_norm(y, own, 1e-6), own)):
        total, normed = TORCH.add_norm(x, y, weight, 1e-6, y_weight)
        assert torch.equal(total, x + added)
        assert torch.equal(normed, rms_norm(x + added, weight, 1e-6))
