"""`dspark calibrate` on a tiny target and a drafter that knows its bigrams: from prompts to the config.json."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import drafters, pairs

import training.prompts
from dspark.cli import main
from dspark.models.drafters.calibration import parse_calibrations

WORDS = "abcdefghij"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pairs.save_pair(tmp_path_factory.mktemp("pair"), dtype=torch.bfloat16)


@pytest.fixture
def pair(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The target, and a drafter of one's own to write to."""
    return made[0], Path(shutil.copytree(made[1], tmp_path / "drafter"))


def prompts_file(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in texts))
    return path


def calibrate(pair: tuple[Path, Path], *arguments: str | Path) -> int:
    """Its exit status."""
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--model", str(pair[0]), "--drafter", str(pair[1]), *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_checkpoint_is_calibrated(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = pair[1] / "config.json"
    before, weights = json.loads(config.read_text()), (pair[1] / "model.safetensors").read_bytes()
    prompts = prompts_file(tmp_path / "fit.jsonl", *(f"tell me {word}" for word in WORDS))
    check = prompts_file(tmp_path / "check.jsonl", *(f"and {word}?" for word in WORDS[:4]))
    figures = tmp_path / "figures.json"
    pytest.importorskip("matplotlib")
    arguments = ("--prompts", prompts, "--check", check, "--repeat", "3", "--max-new-tokens", "24", "--json", figures)
    assert calibrate(pair, *arguments, "--plots", tmp_path / "plots") == 0
    after = json.loads(config.read_text())
    written = parse_calibrations(after.pop("calibration"), drafters.BLOCK, "here")
    assert [one.setting for one in written] == ["rejection", "coupled", "greedy"]
    assert after == before
    assert (pair[1] / "model.safetensors").read_bytes() == weights
    assert sorted(one.name for one in (tmp_path / "plots").iterdir()) == [
        "reliability-coupled.png",
        "reliability-greedy.png",
        "reliability-rejection.png",
    ]
    said = json.loads(figures.read_text())
    assert said["written"]
    for one, calibration in zip(said["settings"], written, strict=True):
        assert one["calibration"]["temperatures"] == list(calibration.temperatures)
        assert 0 < one["texts"] <= (4 if one["setting"] == "greedy" else 12)
        assert one["fitted_rounds"] > one["texts"]
        assert len(one["positions"]) == drafters.BLOCK
        assert 0 < one["positions"][0]["conditional"] < 1
    shown = capsys.readouterr().out
    assert re.search(r"coupled: fitted on \d+ rounds", shown)
    assert "worst" in shown


def test_a_dry_run_and_prompts_held_out(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Every second prompt is checked on; the checkpoint stays as it is; other settings are left alone."""
    kept = (pair[1] / "config.json").read_text()
    prompts = prompts_file(tmp_path / "fit.jsonl", *WORDS)
    figures = tmp_path / "figures.json"
    arguments = ("--prompts", prompts, "--setting", "greedy", "--max-new-tokens", "16", "--json", figures)
    assert calibrate(pair, *arguments, "--skip", "1", "--limit", "6", "--dry-run") == 0
    assert (pair[1] / "config.json").read_text() == kept
    said = json.loads(figures.read_text())
    assert (said["written"], said["settings"][0]["texts"]) == (False, 3)
    assert calibrate(pair, *arguments, "--limit", "4") == 0
    assert [one["setting"] for one in json.loads((pair[1] / "config.json").read_text())["calibration"]] == ["greedy"]


def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = (tmp_path / "no-model", pair[1])
    prompts = prompts_file(tmp_path / "fit.jsonl", "one", "two")

    def refused(*arguments: str | Path, by: tuple[Path, Path] = nowhere) -> str:
        assert calibrate(by, *arguments) == 1
        return capsys.readouterr().err

    assert calibrate(nowhere, "--prompts", prompts, "--setting", "fast") == 2
    assert "setting 'fast' is none of" in capsys.readouterr().err
    assert "no such file" in refused("--prompts", prompts, by=(nowhere[0], tmp_path))
    assert "2 prompts of --check are among --prompts" in refused("--prompts", prompts, "--check", prompts)
    assert "there is no directory" in refused("--prompts", prompts, "--json", tmp_path / "gone" / "x.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install '.[train]'" in refused("--prompts", prompts, "--plots", tmp_path)
    hashes = frozenset({training.prompts.content_hash("two")})
    monkeypatch.setattr(training.prompts, "read_hashes", lambda: hashes)
    assert "prompt 2 is one that drafters are evaluated on" in refused("--prompts", prompts)
    bare = tmp_path / "bare"
    bare.mkdir()
    config = drafters.published_config(enable_confidence_head=False)
    (bare / "config.json").write_text(json.dumps(config))
    assert "without a confidence head has no confidences" in refused("--prompts", prompts, by=(nowhere[0], bare))


def test_prompts_are_needed(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate(pair, "--setting", "greedy") == 1
    assert "some to fit on and some to check on are needed" in capsys.readouterr().err
