"""Linear layers: right, and bit-equal for any number of rows."""

import pytest
import torch
from torch.nn import functional

from dspark.kernels.linear import Linear, PackedLinear, PlainGated, PlainLinear, fast_bf16, gated, linear

ROWS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63)
SHAPES = ((640, 640), (320, 1024), (640, 2048), (192, 4096), (64, 160))
DTYPES = (torch.bfloat16, torch.float32)


def wild(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of very different sizes, as real activations are: sums in another order round differently."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return (values * torch.randn(rows, columns, generator=generator).abs() ** 3).to(dtype)


def assert_invariant(layer: Linear, x: torch.Tensor) -> None:
    whole = layer(x)
    for count in ROWS:
        for start in (*range(0, len(x) - count, count), len(x) - count):
            assert torch.equal(layer(x[start : start + count]), whole[start : start + count]), (count, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_keep_their_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = wild(72, shape[1], dtype, 1)
    weight, other = wild(*shape, dtype, 2), wild(*shape, dtype, 3)
    assert_invariant(linear(weight), x)
    assert_invariant(gated(weight, other, "gelu_tanh"), x)
    assert_invariant(gated(weight, other, "silu"), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_float32_rows_keep_their_bits(shape: tuple[int, int]) -> None:
    """Where oneDNN is not there."""
    assert_invariant(PlainLinear(wild(*shape, torch.float32, 2)), wild(72, shape[1], torch.float32, 1))


def test_a_single_row_would_not() -> None:
    """The trap that padding avoids: without it this project's promise fails on real models, rarely."""
    x, weight = wild(64, 2048, torch.float32, 1), wild(640, 2048, torch.float32, 2)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)

    def product(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
        return result

    whole = product(x)
    assert torch.equal(product(x[:2]), whole[:2])
    if torch.equal(product(x[:1]), whole[:1]):
        pytest.skip("this processor's kernels have no such trap")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_packed_layers_compute_what_plain_ones_do(activation: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, x = (torch.randn(n, 96, generator=generator).div(10).to(dtype) for n in (64, 64, 7))
    assert isinstance(linear(gate), PackedLinear) == (dtype == torch.float32 or fast_bf16(x.device))
    atol, rtol = (1e-6, 1e-5) if dtype == torch.float32 else (2e-3, 2e-2)
    assert torch.allclose(linear(gate)(x), functional.linear(x, gate), atol=atol, rtol=rtol)
    assert torch.allclose(gated(gate, up, activation)(x), PlainGated(gate, up, activation)(x), atol=atol, rtol=rtol)
