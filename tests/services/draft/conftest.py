"""What tests of drafting share."""

import pytest
from support import kernels as choices

from dspark.kernels import Kernels


@pytest.fixture(params=["torch", "llvm"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each implementation that a processor has."""
    return choices.named(request.param)
