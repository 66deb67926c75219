"""int8 linears: near the plain ones, bit-equal for any number of rows, and a numerics of their own."""

import pytest
import torch
from torch.nn import functional

from dspark.devices import pick_numerics
from dspark.errors import ConfigError
from dspark.kernels import select_kernels, team
from dspark.models.fingerprint import numerics_fingerprint

linear_int8 = pytest.importorskip("dspark.kernels.linear_int8")

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not team.available() or linear_int8.compiled().codes is None, reason="no AVX512-VNNI instructions here"
)


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(640, 640), (320, 1024), (96, 160), (4097, 640), (1, 16)])
def test_near_the_plain_layer_and_the_same_in_any_company(shape: tuple[int, int]) -> None:
    weight, x = normal(*shape, 1), normal(70, shape[1], 2)
    layer = linear_int8.linear(weight)
    whole = layer(x)
    assert 0 < distance(whole, functional.linear(x, weight)) < 0.03
    for count in (1, 2, 3, 5, 8, 11, 12, 13, 17, 64):
        for start in (0, 1, 70 - count):
            assert torch.equal(layer(x[start : start + count]), whole[start : start + count]), (count, start)


def test_sums_are_those_of_whole_numbers() -> None:
    """What is made of whole numbers that the codes hold is exact, and nothing is left where it was not written."""
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randint(-127, 128, shape, generator=generator).float() for shape in ((300, 96), (29, 96)))
    weight[:, 0] = x[:, 0] = 127  # so that one is one
    layer = linear_int8.Int8Linear(weight)
    padded = layer.product(x, torch.full((29, 384), torch.nan))
    assert torch.equal(padded[:, :300], x @ weight.T)
    assert not padded[:, 300:].any()


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated(activation: str) -> None:
    gate, up, x = normal(256, 640, 1), normal(256, 640, 2), normal(9, 640, 3)
    layer = linear_int8.gated(gate, up, activation)
    assert distance(layer(x), select_kernels("torch", CPU).gated(gate, up, activation)(x)) < 0.05
    assert torch.equal(layer(x[4:5]), layer(x)[4:5])


def test_a_row_of_zeros_stays_one() -> None:
    x = normal(3, 640, 1)
    x[1] = 0.0
    result = linear_int8.linear(normal(64, 640, 2))(x)
    assert result.isfinite().all()
    assert not result[1].any()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_nothing_finite(odd: float) -> None:
    x = normal(3, 640, 1)
    whole = linear_int8.linear(normal(64, 640, 2))(x)
    x[1, 77] = odd
    found = linear_int8.linear(normal(64, 640, 2))(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], whole[::2])


def test_inputs_that_are_no_whole_vectors_keep_their_weights() -> None:
    assert not isinstance(linear_int8.linear(normal(64, 60, 1)), linear_int8.Int8Linear)


def test_workers_of_either_kind_never_exchange_sequences() -> None:
    own = [pick_numerics("auto", "auto", CPU, weights=weights) for weights in ("plain", "int8")]
    assert len({numerics_fingerprint(one.dtype, one.kernels, CPU) for one in own}) == 2


def test_a_drafter_s_tap_keeps_its_weights() -> None:
    kernels = pick_numerics("auto", "auto", CPU, weights="int8").kernels
    weight, x = normal(640, 1920, 1) * 1.001, normal(5, 1920, 2)
    torch.testing.assert_close(kernels.projection(weight)(x), functional.linear(x, weight), atol=1e-3, rtol=1e-5)


def test_only_with_compiled_kernels_and_not_in_float32() -> None:
    for kernels, device in (("torch", CPU), ("auto", torch.device("meta"))):
        with pytest.raises(ConfigError, match="int8 needs compiled kernels"):
            pick_numerics(kernels, "auto", device, weights="int8")
    with pytest.raises(ConfigError, match="not float32"):
        pick_numerics("auto", "float32", CPU, weights="int8")
