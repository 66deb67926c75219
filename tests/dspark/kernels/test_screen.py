"""Bounds on logits: never below them, the same in any company, near the reference, and not loose."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from dspark.kernels import screen, team

screen_llvm = pytest.importorskip("dspark.kernels.screen_llvm")
linear_llvm = pytest.importorskip("dspark.kernels.linear_llvm")

pytestmark = pytest.mark.skipif(
    not team.available() or None in (screen_llvm.compiled().bounded_codes, screen_llvm.compiled().dots),
    reason="no AVX512-VNNI or no AVX512-BF16 instructions here",
)


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def outlying(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A few numbers of each row, in the same places, are far greater than the others, as in models."""
    x = normal(rows, columns, seed)
    x[:, :: columns // 4] *= 40
    return x


def bounds(head: screen.Screen, x: torch.Tensor) -> torch.Tensor:
    peaks = torch.full((len(x), head.width // screen.PEAKED), torch.nan)
    found = head.above(x, torch.full((len(x), head.width), torch.nan), peaks)
    blocks = functional.pad(found, (0, head.width - found.shape[1]), value=-torch.inf)
    torch.testing.assert_close(peaks, blocks.view(*peaks.shape, screen.PEAKED).amax(2), rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("make", [normal, outlying])
@pytest.mark.parametrize("shape", [(300, 640), (128, 32), (1, 96), (1000, 64), (129, 2048)])
def test_no_logit_is_above_its_bound(shape: tuple[int, int], make: Callable[[int, int, int], torch.Tensor]) -> None:
    weight, x = make(*shape, 1).bfloat16(), make(41, shape[1], 2)
    head = screen_llvm.ScreenedHead(weight)
    found, logits = bounds(head, x), head.whole()(x)
    exact = x.bfloat16().double() @ weight.double().T
    assert bool((found >= logits).all())
    assert bool((found.double() >= exact).all())
    reference = screen.above(weight, x)
    assert bool((reference.double() >= exact).all())
    lengths = x.norm(dim=1)[:, None] * weight.float().norm(dim=1)
    assert float(((found - reference) / lengths).abs().max()) < 1e-3  # codes at the edge between two are either
    assert float(((found - exact) / lengths).max()) < 0.06


@pytest.mark.parametrize("rows", [1, 13])
def test_a_token_without_a_bound_shows_in_its_peak_wherever_it_lies(rows: int) -> None:
    for place in range(0, screen.PEAKED, 5):
        weight = normal(3 * screen.PEAKED, 64, 1).bfloat16()
        weight[screen.PEAKED + place] = torch.nan
        head, x = screen_llvm.ScreenedHead(weight), normal(rows, 64, 2)
        peaks = torch.zeros(rows, head.width // screen.PEAKED)
        head.above(x, torch.empty(rows, head.width), peaks)
        assert peaks.isnan().any(0).tolist()[:3] == [False, True, False]


def test_turning_brings_bounds_nearer() -> None:
    weight, x = outlying(500, 640, 1).bfloat16(), outlying(20, 640, 2)
    (codes, unit), (x_codes, x_unit) = screen.coded(weight.float()), screen.coded(x.bfloat16().float())
    error = (weight.float() - codes * unit).norm(dim=1) * x.norm(dim=1)[:, None]
    error += weight.float().norm(dim=1) * (x - x_codes * x_unit).norm(dim=1)[:, None]
    turned = bounds(screen_llvm.ScreenedHead(weight), x) - x.bfloat16().float() @ weight.float().T
    assert float(turned.mean()) < 0.6 * float(error.mean())


@pytest.mark.parametrize("block", [32, 64, 128])
def test_turned_products_stay_what_they_are(block: int) -> None:
    turn = screen.hadamard(block)
    assert torch.equal(turn @ turn, block * torch.eye(block))
    a, b = (screen.strided(normal(3, 3 * block, seed).double(), block) @ turn.double() for seed in (1, 2))
    expected = (normal(3, 3 * block, 1).double() * normal(3, 3 * block, 2).double()).sum(1)
    torch.testing.assert_close((a.view(3, -1) * b.view(3, -1)).sum(1) / block, expected)


def test_bits_are_the_same_in_any_company_and_whatever_the_threads() -> None:
    weight, x = outlying(700, 640, 1).bfloat16(), outlying(70, 640, 2)
    whole = bounds(screen_llvm.ScreenedHead(weight), x)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    head = screen_llvm.ScreenedHead(weight)
    for count in (1, 2, 3, 11, 12, 13, 64):
        for start in (0, 1, 70 - count):
            assert torch.equal(bounds(head, x[start : start + count]), whole[start : start + count]), (count, start)
    torch.set_num_threads(before)


def test_what_is_not_finite_is_not_bounded() -> None:
    head, x = screen_llvm.ScreenedHead(normal(200, 64, 1).bfloat16()), normal(5, 64, 2)
    x[1, 3], x[2, 63], x[3] = torch.nan, torch.inf, 0.0
    finite = bounds(head, x).isfinite()
    assert finite.all(1).tolist() == [True, False, False, True, True]
    assert not finite[1:3].any()


def test_whole_logits_are_those_of_the_plain_head() -> None:
    weight, x = normal(300, 160, 1).bfloat16(), normal(9, 160, 2)
    assert torch.equal(screen_llvm.ScreenedHead(weight).whole()(x), linear_llvm.rounded_linear(weight.float())(x))


def test_heads_that_are_computed_at_once() -> None:
    least = screen.LEAST_OUTPUTS
    assert screen_llvm.screen(torch.zeros(least, 32, dtype=torch.bfloat16)) is not None
    assert screen_llvm.screen(torch.zeros(least - 1, 32, dtype=torch.bfloat16)) is None
    assert screen_llvm.screen(torch.zeros(least, 48, dtype=torch.bfloat16)) is None  # nothing to turn by
    assert screen_llvm.screen(torch.zeros(least, 32)) is None
