"""int8 linears: near the plain ones, bit-equal for any number of rows, and a numerics of their own."""

import pytest
import torch
from torch.nn import functional

from dspark.errors import ConfigError
from dspark.kernels import TORCH
from dspark.kernels.linear_int8 import Int8Linear, gated, linear, with_int8_weights
from dspark.models.fingerprint import numerics_fingerprint

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="no VNNI instructions here")


def normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("shape", [(640, 640), (320, 1024), (96, 160), (4096, 640)])
def test_near_the_plain_layer_and_the_same_in_any_company(shape: tuple[int, int]) -> None:
    weight, x = normal(*shape, 1), normal(70, shape[1], 2)
    layer = linear(weight)
    whole = layer(x)
    assert distance(whole, functional.linear(x, weight)) < 0.03
    for count in (1, 2, 3, 5, 8, 17, 64):
        for start in (0, 1, 70 - count):
            assert torch.equal(layer(x[start : start + count]), whole[start : start + count]), (count, start)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated(activation: str) -> None:
    gate, up, x = normal(256, 640, 1), normal(256, 640, 2), normal(9, 640, 3)
    layer = gated(gate, up, activation)
    assert distance(layer(x), TORCH.gated(gate, up, activation)(x)) < 0.05
    assert torch.equal(layer(x[4:5]), layer(x)[4:5])


def test_a_row_of_zeros_stays_one() -> None:
    x = normal(3, 640, 1)
    x[1] = 0.0
    result = linear(normal(64, 640, 2))(x)
    assert result.isfinite().all()
    assert not result[1].any()


def test_other_weights_stay_as_they_were() -> None:
    assert not isinstance(linear(normal(64, 640, 1).float()), Int8Linear)


def test_workers_of_either_kind_never_exchange_sequences() -> None:
    kernels = with_int8_weights(TORCH, CPU)
    assert numerics_fingerprint(torch.bfloat16, kernels, CPU) != numerics_fingerprint(torch.bfloat16, TORCH, CPU)


def test_only_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="VNNI"):
        with_int8_weights(TORCH, torch.device("meta"))
