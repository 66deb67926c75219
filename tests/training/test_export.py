"""The published layout: what fits comes back the same through `dspark propose`, what does not is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import data_sets, tiny
from support.data_sets import SETTINGS, SHAPE

from dspark.cli import main
from dspark.errors import ConfigError
from dspark.kernels import select_kernels
from dspark.models.drafters import load_drafter
from dspark.models.target import load_target
from training.export import export_deepspec
from training.run import train
from training.trainer import Alone

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, as the layout's copies of its tensors are: what comes back computes the very same."""
    return tiny.save_qwen3(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def trained(target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of a drafter that fits: plain tap, whole vocabulary, a Qwen3 target."""
    directory = tmp_path_factory.mktemp("qwen")
    target = load_target(target_path, dtype=torch.bfloat16, device=CPU, kernels=select_kernels("auto", CPU))
    data = data_sets.make(target, directory / "set")
    plan = data_sets.run_plan(target_path, data, directory)
    layers = tuple(range(target.config.num_layers - 1))[:2]
    shape = replace(SHAPE, draft_vocab_size=0, target_layer_ids=layers, plain_tap=True)
    train(replace(plan, shape=shape, settings=replace(SETTINGS, blocks=320)), Alone(), lambda _: None)
    return plan.out


def propose(target: Path, drafter: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, list[float]]]:
    with pytest.raises(SystemExit) as ended:
        main(["propose", "--target", str(target), "--drafter", str(drafter), "--ids", str(ids), "--json"])
    assert ended.value.code == 0
    found: list[dict[str, list[float]]] = json.loads(capsys.readouterr().out)
    return found


def test_exported_drafter_proposes_the_same(
    trained: Path, target_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "published"
    with pytest.raises(SystemExit) as ended:
        main(["train", "export", "--drafter", str(trained), "--out", str(out), "--model", str(target_path)])
    assert ended.value.code == 0
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3DSparkModel"]
    (tmp_path / "ids.json").write_text("[[2, 5, 9, 12], [2, 40]]")
    capsys.readouterr()
    ours = propose(target_path, trained, tmp_path / "ids.json", capsys)
    published = propose(target_path, out, tmp_path / "ids.json", capsys)
    for one, other in zip(ours, published, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["confidence_logits"] == pytest.approx(other["confidence_logits"], abs=1e-5)
    load_drafter(out, target_path=None, dtype=torch.float32, device=CPU)


def test_what_does_not_fit_is_refused_with_every_reason(trained: Path, target_path: Path, tmp_path: Path) -> None:
    drafter = load_drafter(trained, target_path=target_path, dtype=torch.bfloat16, device=CPU)
    drafter.config = replace(drafter.config, fc_bias=True, hidden_act="gelu_pytorch_tanh", draft_vocab_size=64)
    with pytest.raises(ConfigError, match=r"64 of .* tokens; its tap has a bias .*; its activation"):
        export_deepspec(drafter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directory_that_is_taken_is_refused(trained: Path, target_path: Path, tmp_path: Path) -> None:
    drafter = load_drafter(trained, target_path=target_path, dtype=torch.bfloat16, device=CPU)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        export_deepspec(drafter, tmp_path)
