"""Compiled linears: right on awkward shapes, in both forms of weights and tiles, and the same bits in any company."""

import pytest
import torch
from torch.nn import functional

from dspark.kernels import linear_llvm, team
from dspark.kernels.linear import PackedLinear, PlainGated, fast_bf16
from dspark.kernels.linear_llvm import StreamedLinear, gated, linear, rounded_gated, rounded_linear
from dspark.kernels.product_llvm import compiled
from dspark.kernels.tiles_llvm import NARROW, WIDE, Tiling

pytestmark = pytest.mark.skipif(not team.available(), reason="this torch has no OpenMP that can be called")

SHAPES = ((1, 1), (63, 60), (64, 640), (65, 77), (640, 2048), (1537, 320))
ROWS = 41  # several full tiles and one that is not
DOTS = pytest.mark.skipif(not team.available() or compiled().dots is None, reason="no AVX512-BF16 instructions here")
TILINGS = pytest.mark.parametrize("tiling", [NARROW, WIDE], ids=["narrow", "wide"])


def drawn(rows: int, columns: int, seed: int, *, bfloat16: bool = False) -> torch.Tensor:
    """Numbers of very different sizes; sums in another order round differently."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.randn(rows, columns, generator=generator).abs() ** 3
    return values.bfloat16().float() if bfloat16 else values


@TILINGS
@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right_and_rows_keep_their_bits(shape: tuple[int, int], bfloat16: bool, tiling: Tiling) -> None:
    weight, x = drawn(*shape, 1, bfloat16=bfloat16), drawn(ROWS, shape[1], 2)
    layer = StreamedLinear(weight, compiled(tiling))
    whole = layer(x)
    padded = layer.product(
        x, torch.full((ROWS, -(-shape[0] // tiling.group_outputs) * tiling.group_outputs), torch.nan)
    )
    assert torch.equal(padded[:, : shape[0]], whole)
    assert not padded[:, shape[0] :].any()
    exact = x.double() @ weight.double().T
    bound = shape[1] * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    assert ((whole - exact).abs() <= bound).all()
    for rows in range(ROWS + 1):
        assert torch.equal(layer(x[:rows]), whole[:rows]), rows
        assert torch.equal(layer(x[ROWS - rows :]), whole[ROWS - rows :]), rows


@DOTS
@pytest.mark.parametrize("shape", [(1, 16), (63, 32), (64, 640), (640, 2048), (1537, 336)])
def test_rounded_products_are_those_of_bfloat16_rows(shape: tuple[int, int]) -> None:
    weight, x = drawn(*shape, 1, bfloat16=True), drawn(ROWS, shape[1], 2)
    layer = rounded_linear(weight)
    assert isinstance(layer, StreamedLinear)
    whole = layer(x)
    padded = layer.product(x, torch.full((ROWS, -(-shape[0] // WIDE.group_outputs) * WIDE.group_outputs), torch.nan))
    assert torch.equal(padded[:, : shape[0]], whole)
    assert not padded[:, shape[0] :].any()
    rows = x.bfloat16().double()
    bound = shape[1] * torch.finfo(torch.float32).eps * (rows.abs() @ weight.double().abs().T)
    assert ((whole - rows @ weight.double().T).abs() <= bound).all()
    assert not torch.equal(whole, linear(weight)(x))  # which does not round
    for count in range(ROWS + 1):
        assert torch.equal(layer(x[:count]), whole[:count]), count
        assert torch.equal(layer(x[ROWS - count :]), whole[ROWS - count :]), count


@pytest.mark.parametrize("outputs", [256, 300])
def test_outputs_are_written_where_they_are_told_to(outputs: int) -> None:
    weight, x = drawn(outputs, 64, 1), drawn(9, 64, 2)
    layer = StreamedLinear(weight)
    memory = torch.full((9, layer.width), torch.nan)
    found = layer.into(x, memory)
    assert torch.equal(found, layer(x))
    assert found.data_ptr() == memory.data_ptr()


@DOTS
def test_rows_are_rounded_only_where_both_sides_fit() -> None:
    x = drawn(9, 60, 2)
    odd_inputs, odd_weight = drawn(64, 60, 1, bfloat16=True), drawn(64, 96, 1)
    assert torch.equal(rounded_linear(odd_inputs)(x), linear(odd_inputs)(x))
    wide = drawn(9, 96, 2)
    assert torch.equal(rounded_linear(odd_weight)(wide), linear(odd_weight)(wide))


@TILINGS
def test_bits_do_not_depend_on_tiles_threads_or_how_a_weight_is_kept(tiling: Tiling) -> None:
    weight, x = drawn(1537, 320, 1, bfloat16=True), drawn(ROWS, 320, 2)
    whole = StreamedLinear(weight)(x)
    assert torch.equal(StreamedLinear(weight, compiled(tiling))(x), whole)
    odd = torch.cat((weight, drawn(1, 320, 3)))  # one row that bfloat16 does not hold: all are kept in float32
    layer = StreamedLinear(odd, compiled(tiling))
    assert torch.equal(layer(x)[:, :-1], whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(layer(x)[:, :-1], whole)
    finally:
        torch.set_num_threads(threads)


def test_a_weight_is_kept_in_as_few_bytes_as_hold_it() -> None:
    weight = drawn(640, 320, 1, bfloat16=True)
    assert StreamedLinear(weight).weight_bytes == weight.numel() * 2
    weight[639, 319] += 1e-6 * weight[639, 319].abs()
    assert StreamedLinear(weight).weight_bytes == weight.numel() * 4


@DOTS
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated_layers_of_rounded_rows(activation: str) -> None:
    gate, up, x = (drawn(rows, 96, seed, bfloat16=True).div(8) for seed, rows in enumerate((200, 200, 7)))
    layer = rounded_gated(gate, up, activation)
    torch.testing.assert_close(layer(x), PlainGated(gate, up, activation)(x), atol=1e-5, rtol=1e-5)
    fine = x * 1.001
    torch.testing.assert_close(
        layer(fine), PlainGated(gate, up, activation)(fine.bfloat16().float()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_gated_layers_compute_what_plain_ones_do(activation: str) -> None:
    gate, up, x = (drawn(rows, 96, seed).div(10) for seed, rows in enumerate((200, 200, 7)))
    layer = gated(gate, up, activation)
    torch.testing.assert_close(layer(x), PlainGated(gate, up, activation)(x), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(layer(x[row : row + 1]), layer(x)[row : row + 1]) for row in range(7))


def test_rows_that_do_not_lie_one_behind_another() -> None:
    layer, x = linear(drawn(64, 60, 1)), drawn(9, 120, 2)
    assert torch.equal(layer(x[:, ::2]), layer(x[:, ::2].contiguous()))


def test_bfloat16_rows_stay_with_onednn() -> None:
    weight = drawn(64, 96, 1).bfloat16()
    assert not isinstance(linear(weight), StreamedLinear)
    assert isinstance(linear(weight), PackedLinear) == fast_bf16(weight.device)
    x = drawn(5, 96, 2).bfloat16()
    torch.testing.assert_close(linear(weight)(x), functional.linear(x, weight), atol=2e-3, rtol=2e-2)
    assert linear_llvm.gated(weight, weight, "silu")(x).dtype == torch.bfloat16
