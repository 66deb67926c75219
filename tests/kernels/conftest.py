"""Every test here takes a `device`: the CPU where Triton interprets, a CUDA device where it compiles (marked gpu).

A plain run on a machine without a card runs these tests through `test_interpreted`, in a process of its own: Triton
reads TRITON_INTERPRET when kernels are declared, and nothing else should meet it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def nothing_is_there_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote to reads as NaN, or as the greatest integer."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*args: Any, **named: Any) -> torch.Tensor:
        tensor = make(*args, **named)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return made


def pytest_configure() -> None:
    if INTERPRETED:
        np.seterr(all="ignore")  # a card does not warn of exp(large) = inf either
        _patch_once()


def _patch_once() -> None:
    """The interpreter patches its language at every device function's call, at great cost; once will do."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patched: set[int] = set()

    def call(self: Any, *args: Any, **named: Any) -> Any:
        names = id(self.fn.__globals__)
        if names not in patched:
            patched.add(names)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    interpreter.InterpretedFunction.__call__ = call
