"""The report: its figures on rounds made by hand, and the command on tiny models, with plots."""

import asyncio
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from support import pairs
from typer.testing import CliRunner

from dspark.cli.train import app
from dspark.errors import ConfigError
from dspark.models.drafters.calibration import Calibration
from training.figures import draw, read_log
from training.report import Row, SweepPoint, sweep
from training.rounds import Rounds

SURE, UNSURE = math.log(0.95 / 0.05), math.log(0.25 / 0.75)


def rounds_of(*rows: tuple[int, int, list[float], int]) -> Rounds:
    """(text, committed, confidence logits, accepted), everything drafted."""
    text, committed, logits, accepted = zip(*rows, strict=True)
    drafted = torch.full((len(rows),), len(logits[0]))
    return Rounds(torch.tensor(logits), torch.tensor(accepted), drafted, torch.tensor(text), torch.tensor(committed))


def test_thresholds_trim_by_prefix_survival_and_play_on() -> None:
    every = rounds_of(
        (0, 4, [SURE, UNSURE], 2),
        (0, 5, [UNSURE, SURE], 0),
        (0, 6, [SURE, SURE], 1),
        (0, 7, [UNSURE, UNSURE], 0),
        (1, 9, [SURE, SURE], 2),
    )
    points = {point.threshold: point for point in sweep(every)}
    # All: rounds at 4 (gains 3), 7, and 9 of the other text.
    assert figures(points[0.0]) == pytest.approx((4 / 6, 2.0, 1 + 4 / 3))
    # From 0.3: one token is verified at 4, so that 6 comes next, where both are and one stands; then 9.
    assert figures(points[0.5]) == pytest.approx((4 / 5, 5 / 3, 1 + 4 / 3))
    assert points[0.9].acceptance == pytest.approx(4 / 5)  # .95 squared is .9025
    # As calibrated nothing is sure enough.
    flat = Calibration("greedy", (1e9, 1e9), (0.0, 0.0))
    last = sweep(every, flat)[-1]
    assert (last.kept, last.tau, math.isnan(last.acceptance)) == (0.0, 1.0, True)


def figures(point: SweepPoint) -> tuple[float, float, float]:
    return point.acceptance, point.kept, point.tau


def row_of(drafter: str, setting: str = "greedy", tau: float = 2.0) -> Row:
    points = tuple(SweepPoint(step / 10, 0.5 + step / 20, 2.0 - step / 10, tau) for step in range(10))
    return Row(drafter, "maths", setting, 4, 1, 40, tau, 1.5, (0.8, 0.6, float("nan")), False, points)


def test_figures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    records = [{"event": "step", "step": 20}, {"event": "validation", "step": 20, "tau": 1.5, "greedy_tau": 1.6}]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    logs = {"first": read_log(run)}
    rows = [row_of("depth=1", tau=1.4), row_of("depth=2"), row_of("other"), row_of("other", "coupled")]
    names = {path.name for path in draw(rows, logs, tmp_path / "plots")}
    per_setting = {
        f"{kind}-{setting}.svg" for kind in ("tau", "acceptance", "threshold") for setting in ("greedy", "coupled")
    }
    assert names == per_setting | {"depth-greedy.svg", "training.svg"}
    drawn = {path.name: path.read_text() for path in (tmp_path / "plots").iterdir()}
    assert all(text.lstrip().startswith("<?xml") for text in drawn.values())
    assert "conditional acceptance" in drawn["acceptance-greedy.svg"]
    assert "depth=2" in drawn["tau-greedy.svg"]
    again = draw(rows, logs, tmp_path / "again")
    assert {path.name: path.read_text() for path in again} == drawn


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no training log"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"event": "step"}\n')
    with pytest.raises(ConfigError, match="holds no validation"):
        read_log(tmp_path)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="the `train` extra"):
        draw([row_of("one")], {}, tmp_path)


async def report(*arguments: str) -> tuple[int, str, str]:
    command = ["-c", "from dspark.cli import main; main()", "train", "report", *arguments]
    done = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await done.communicate()
    assert done.returncode is not None
    return done.returncode, out.decode(), err.decode()


async def test_the_command_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "220")
    target, drafter = pairs.save_pair(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"{i} and {i}"]}) + "\n" for i in range(5)))
    asked = ["--model", str(target), "--dtype", "float32", "--prompts", f"sums={prompts}", "--skip", "1"]
    asked += ["--drafter", f"depth=2={drafter}", "--drafter", "lookup=ngram", "--max-tokens", "30"]
    written, plots = tmp_path / "figures.json", tmp_path / "plots"
    status, out, err = await report(*asked, "--json", str(written), "--plots", str(plots))
    assert status == 0, err
    assert "Accepted length" in out
    found = json.loads(written.read_text())
    named = {(row["drafter"], row["setting"]): row for row in found["rows"]}
    assert len(named) == 6
    assert all(row["texts"] == 4 and row["rounds"] > 4 for row in named.values())
    ours = named["depth=2", "coupled"]
    assert ours["tau"] > 1.2
    assert ours["sweep"][0]["tau"] == pytest.approx(ours["tau"])
    assert not ours["calibrated"]
    assert named["depth=2", "greedy"]["tau_without_loops"] is not None
    times = {(time["drafter"], time["streams"]): time for time in found["times"]}
    assert 0 < times["depth=2", 8]["head_of_round"] < times["depth=2", 8]["head_of_draft"] < 1
    assert times["lookup", 1]["head"] == 0
    assert {path.name for path in plots.iterdir()} >= {"tau-greedy.svg", "depth-rejection.svg"}


def test_the_command_refuses_in_a_line(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["a"]}\n')
    asked = ["report", "--prompts", f"one={prompts}", "--model", str(tmp_path)]
    for changes, message in (
        (["--drafter", "a=ngram", "--settings", "fast"], "of rejection, coupled, greedy"),
        (["--drafter", "a=ngram", "--skip", "1"], "has no prompt behind the first 1"),
        (["--drafter", "a=ngram", "--log", f"x={tmp_path}"], "no training log"),
        (["--drafter", "a=ngram", "--log", str(tmp_path)], "is not NAME=VALUE"),
        (["--drafter", "a=ngram", "--json", str(tmp_path / "no" / "file")], "there is no directory"),
    ):
        result = CliRunner().invoke(app, [*asked, *changes])
        assert result.exit_code > 0
        assert message in " ".join(f"{result.output} {result.exception}".replace("│", " ").split())
