"""Which numbers a device computes in."""

import pytest
import torch

from dspark.devices import pick_dtype
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
