"""A row of a linear layer has the same bits whatever number of rows it is computed with, at a real model's sizes."""

import pytest
import torch

from dspark.kernels.linear import gated, linear

ROWS = 96
COUNTS = (1, 2, 3, 4, 5, 7, 8, 16, 33)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("inputs", [256, 640, 1024, 2048, 4096])
@pytest.mark.parametrize("pair", [False, True], ids=["linear", "gated"])
def test_a_row_keeps_its_bits_in_any_number_of_rows(dtype: torch.dtype, inputs: int, *, pair: bool) -> None:
    generator = torch.Generator().manual_seed(inputs)
    first, second, x = (torch.randn(count, inputs, generator=generator).to(dtype) for count in (640, 640, ROWS))
    layer = gated(first, second, "gelu_tanh") if pair else linear(first)
    whole = layer(x)
    for count in COUNTS:
        for start in range(0, ROWS - count + 1, count):
            rows = layer(x[start : start + count].contiguous())
            assert torch.equal(rows, whole[start : start + count]), f"{count} rows from {start}"
