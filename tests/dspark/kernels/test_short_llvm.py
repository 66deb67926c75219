"""Weights in 12 and 13 bits: the very numbers, so the very bits of products over plain ones."""

from dataclasses import replace

import pytest
import torch

from dspark.kernels import team
from dspark.kernels.linear_llvm import StreamedLinear
from dspark.kernels.product_llvm import compiled
from dspark.kernels.short_llvm import MOST_UPPER, shortened

pytestmark = pytest.mark.skipif(
    not team.available() or compiled().short4 is None, reason="no AVX512-BF16 instructions here"
)

SHAPES = ((1, 16), (63, 32), (129, 640), (640, 2048), (1536, 336))
ROWS = 61  # a tile, two, and so many that the first makes weights plain for the others


def weights(shape: tuple[int, int], bits: int) -> torch.Tensor:
    """As trained ones are, with as few exponents as `bits` of a code hold, and both zeros among them."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    if bits == 12:
        values = values.mul(64).round().clamp(-100, 100).div(64)
    values.view(-1)[:2] = torch.tensor([0.0, -0.0])
    return values.bfloat16().float()


def layers(weight: torch.Tensor) -> tuple[StreamedLinear, StreamedLinear]:
    """Over the weight in fewer bits, and as it is."""
    plain = replace(compiled(), short4=None, short5=None)
    return StreamedLinear(weight, rounded=True), StreamedLinear(weight, plain, rounded=True)


@pytest.mark.parametrize("bits", [12, 13])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_have_the_bits_of_those_over_plain_weights(shape: tuple[int, int], bits: int) -> None:
    weight, x = weights(shape, bits), torch.randn(ROWS, shape[1], generator=torch.Generator().manual_seed(2))
    short, plain = layers(weight)
    for rows in range(1, ROWS + 1):
        out = short.product(x[:rows], torch.full((rows, short.width), torch.nan))
        assert torch.equal(out, plain.product(x[:rows], torch.full((rows, short.width), torch.nan))), rows
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads % 2 + 1)
        assert torch.equal(short(x), plain(x))
    finally:
        torch.set_num_threads(threads)


def made_plain(packed: torch.Tensor, steps: int, *, five: bool) -> torch.Tensor:
    """What packed panels stand for, (panels, steps, 2, 32) of 16 bits, one number after another."""
    size = 104 if five else 96
    tables = packed[0, steps * size :].view(-1, 4, 16)[:, 0].flatten().tolist()
    plain = torch.zeros(len(packed), steps, 2, 32, dtype=torch.int16)
    for panel, step in torch.cartesian_prod(torch.arange(len(packed)), torch.arange(steps)).tolist():
        own = packed[panel, step * size : (step + 1) * size].tolist()
        for place in range(64):
            code = own[64 + place % 32] >> 4 * (place // 32) & 15
            code += 16 * (own[96 + place // 8] >> place % 8 & 1) if five else 0
            number = tables[code] << 8 | own[place]
            lane, within = divmod(place, 16)
            plain[panel, step, within // 8, 8 * lane + within % 8] = number - (number >> 15 << 16)
    return plain


@pytest.mark.parametrize("bits", [12, 13])
def test_every_number_stays_what_it_is(bits: int) -> None:
    weight = weights((128, 32), bits).bfloat16()
    odd = [torch.inf, -torch.inf, torch.nan, -torch.nan, 2.0**-133, -(2.0**-133), 3e38]
    weight.view(-1)[2 : 2 + len(odd)] = torch.tensor(odd).bfloat16()
    if bits == 12:  # what else is there has few upper bytes
        weight = torch.where(weight.float().abs() < 0.25, 0.25, weight.float()).bfloat16()
    panels = weight.view(torch.int16).view(-1, 16, 2, 16, 2)  # numbers anywhere: only their bits matter
    packed, five = shortened(panels) or pytest.fail("too many upper bytes")
    assert five == (bits == 13)
    assert torch.equal(made_plain(packed, 16, five=five), panels.flatten(3))


@pytest.mark.parametrize("bits", [12, 13])
def test_a_weight_takes_so_many_bits(bits: int) -> None:
    weight = weights((512, 640), bits)
    short, plain = layers(weight)
    assert plain.weight_bytes == weight.numel() * 2
    assert 0 <= short.weight_bytes - weight.numel() * bits / 8 <= 128 * 512 / 32  # a table or two a panel


def test_too_many_exponents_leave_a_weight_as_it_is() -> None:
    sizes = torch.linspace(-40, 40, 2 * MOST_UPPER).repeat(16, 1).exp2()
    short, plain = layers(sizes.bfloat16().float())
    assert short.weight_bytes == plain.weight_bytes
    assert shortened(torch.zeros(1, 8, 2, 16, 2, dtype=torch.int16)) is not None
