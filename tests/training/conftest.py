"""A data set shared by the tests of what is made of it."""

from pathlib import Path

import pytest
import torch
from support import data_sets

from dspark.kernels import select_kernels
from dspark.models.target import TargetModel, load_target
from training.plan import RunPlan


@pytest.fixture(scope="session")
def target(tiny_gemma: Path) -> TargetModel:
    kernels = select_kernels("auto", data_sets.CPU)
    return load_target(tiny_gemma, dtype=torch.bfloat16, device=data_sets.CPU, kernels=kernels)


@pytest.fixture(scope="session")
def data_set(target: TargetModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_sets.make(target, tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def plan(tiny_gemma: Path, data_set: Path, tmp_path: Path) -> RunPlan:
    return data_sets.run_plan(tiny_gemma, data_set, tmp_path)
