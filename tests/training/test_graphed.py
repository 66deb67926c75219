"""Steps recorded as CUDA graphs are the steps that they were recorded from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import data_sets

from dspark.devices import pick_dtype
from dspark.kernels import select_kernels
from dspark.models.target import load_target
from training.plan import RunPlan
from training.run import train
from training.trainer import Alone, StepReport

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def written_there(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = load_target(tiny_gemma, dtype=pick_dtype("auto", CUDA), device=CUDA, kernels=select_kernels("auto", CUDA))
    return data_sets.make(target, tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3", "mtp"])
@pytest.mark.parametrize("gigabytes", [0.1, 0.0001])
def test_same_losses_as_step_by_step(
    tiny_gemma: Path, written_there: Path, tmp_path: Path, architecture: str, gigabytes: float
) -> None:
    """Two parts a step are not recorded; equal but for the order of sums, and states that are kept or not."""
    hints = (1, 2) if architecture == "dspark" else ()
    shape = replace(
        data_sets.SHAPE, architecture=architecture, layers=1 if architecture == "eagle3" else 2, hint_lengths=hints
    )
    settings = replace(data_sets.SETTINGS, lengths=(1, 3), learning_rate=1e-3)  # at 5e-3 a chain's first steps diverge

    def run(name: str, plan: RunPlan) -> list[StepReport]:
        reports: list[StepReport] = []
        train(replace(plan, run=tmp_path / name, out=tmp_path / f"{name}-out"), Alone(), reports.append)
        return reports

    plan = replace(
        data_sets.run_plan(tiny_gemma, written_there, tmp_path),
        shape=shape, settings=settings, device="cuda", cache_gb=gigabytes,
    )  # fmt: skip
    recorded = run("recorded", plan)
    plain = run("plain", replace(plan, settings=replace(settings, accumulate=2)))
    assert recorded[-1].loss < recorded[0].loss
    for ours, theirs in zip(recorded[:10], plain[:10], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.03)
        assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=0.1)
