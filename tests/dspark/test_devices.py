"""Which numbers a device computes in."""

import platform

import pytest
import torch

from dspark.devices import drafting, pick_dtype, pick_numerics
from dspark.errors import ConfigError
from dspark.kernels.linear import fast_bf16

CPU = torch.device("cpu")


def test_auto_is_bfloat16_where_the_device_multiplies_it_fast() -> None:
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", CPU) == (torch.bfloat16 if fast_bf16(CPU) else torch.float32)


def test_a_name_is_taken_at_its_word() -> None:
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert pick_dtype("float32", torch.device("cuda")) == torch.float32
    with pytest.raises(ConfigError, match="'half' is not one of auto, bfloat16, float32"):
        pick_dtype("half", CPU)


def test_compiled_kernels_keep_float32_between_products() -> None:
    auto = pick_numerics("auto", "auto", CPU)
    assert pick_numerics("torch", "auto", CPU).dtype == pick_dtype("auto", CPU)
    if auto.kernels.implementation != "llvm":
        pytest.skip("no compiled kernels here")
    exact = pick_numerics("llvm", "float32", CPU)
    assert (exact.dtype, exact.products) == (torch.float32, torch.float32)
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert auto.dtype == torch.float32
    if auto.products == torch.bfloat16 and auto.dtype == torch.float32:
        assert auto == pick_numerics("llvm", "bfloat16", CPU)
        assert auto.kernels.name != exact.kernels.name
    with pytest.raises(ConfigError, match="'half' is not one of"):
        pick_numerics("auto", "half", CPU)


def test_int8_by_itself_where_bfloat16_is_multiplied_only() -> None:
    for kernels, dtype in (("torch", "auto"), ("auto", "float32")):
        assert pick_numerics(kernels, dtype, CPU, weights="auto") == pick_numerics(kernels, dtype, CPU)
    plain, auto = (pick_numerics("auto", "auto", CPU, weights=weights) for weights in ("plain", "auto"))
    assert (auto.dtype, auto.products) == (plain.dtype, plain.products)
    assert auto.kernels is drafting(plain.kernels)
    if auto != plain:
        assert auto == pick_numerics("auto", "auto", CPU, weights="int8")
