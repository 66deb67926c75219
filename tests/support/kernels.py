"""Kernels by name, for tests that want each."""

from __future__ import annotations

import pytest
import torch

from dspark.errors import ConfigError
from dspark.kernels import Kernels, select_kernels


def named(name: str) -> Kernels:
    """For a CPU; the test is skipped where it has none of these."""
    try:
        return select_kernels(name, torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
