"""Completions have the same tokens alone and in batches, with plain and with int8 weights."""

from pathlib import Path

import pytest
import torch
from support import tiny
from support.targets import new_cache

from benchmarks.invariance import completions, differing, requests
from dspark.devices import pick_numerics
from dspark.errors import ConfigError
from dspark.models.target import load_target
from services.verifier.engine import VerifyEngine

CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_alone_and_together(tiny_gemma: Path, weights: str) -> None:
    try:
        own = pick_numerics("auto", "auto", CPU, weights=weights)
    except ConfigError as error:
        pytest.skip(str(error))
    model = load_target(tiny_gemma, dtype=own.dtype, device=CPU, kernels=own.kernels)
    engine = VerifyEngine(model, new_cache(model, pages=2048, prefix_cache=False))
    wanted = [r for r in requests(60, 8, tiny.VOCAB) if len(r.token_ids) < 400]
    assert not differing(engine, wanted)
    assert len({completions(engine, [request])[0] for request in wanted}) > len(wanted) // 2
