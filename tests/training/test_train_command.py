"""`dspark train` as it is typed: from prompts to a checkpoint, killed in the middle, in two processes, and mistyped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.models.drafters import load_drafter

DSPARK = shutil.which("dspark", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or "dspark"
SMALL = ["--block", "3", "--rank", "8", "--draft-vocab", "128", "--feature-layers", "0,2,4", "--cache-gb", "0.1"]
STEPS = ["--sequences", "4", "--anchors", "8", "--blocks", "1920", "--save-every", "10", "--validate-every", "40"]


def dspark(*arguments: str, status: int = 0) -> str:
    """What the command wrote to stdout, or to stderr where it is to fail."""
    done = subprocess.run([DSPARK, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def train(target: Path, data: Path, place: Path, *more: str) -> list[str]:
    places = ["--data", str(data), "--run-dir", str(place / "run"), "--out", str(place / "out")]
    return ["train", "run", "--model", str(target), *places, *SMALL, *STEPS, "--threads", "1", *more]


def steps_logged(run: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == "step"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"What are {i} and {i}?"]}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def made(tiny_gemma: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "data"
    arguments = ["train", "data", "--model", str(tiny_gemma), "--prompts", str(prompts), "--out", str(out)]
    manifest = json.loads(dspark(*arguments, "--count", "40", "--max-new-tokens", "16", "--batch", "16", "--json"))
    assert manifest["prompts"] == 40
    assert manifest["response_tokens"] > 300
    return out


def test_killed_run_goes_on_to_the_very_same_end(tiny_gemma: Path, made: Path, tmp_path: Path) -> None:
    whole = json.loads(dspark(*train(tiny_gemma, made, tmp_path / "whole", "--json")))
    assert whole["cache_bytes"] <= 0.1e9
    killed = train(tiny_gemma, made, tmp_path / "killed", "--json")
    process = subprocess.Popen([DSPARK, *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state, deadline = tmp_path / "killed" / "run" / "state.safetensors", time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "out").exists()  # it was in the middle
    resumed = json.loads(dspark(*killed))
    assert resumed["step"]["loss"] == whole["step"]["loss"]
    assert resumed["validation"] == whole["validation"]
    one, other = (
        load_drafter(tmp_path / name / "out", target_path=tiny_gemma, dtype=torch.bfloat16, device=torch.device("cpu"))
        for name in ("whole", "killed")
    )
    assert one.fingerprint != ""
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_two_processes_take_the_steps_of_one(tiny_gemma: Path, made: Path, tmp_path: Path) -> None:
    short = ["--blocks", "640", "--json"]
    dspark(*train(tiny_gemma, made, tmp_path / "one", *short))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, DSPARK, *train(tiny_gemma, made, tmp_path / "two", *short)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (steps_logged(tmp_path / name / "run") for name in ("one", "two"))
    assert one[20]["loss"] == pytest.approx(two[20]["loss"], rel=0.05)
    assert len(done.stdout.strip().splitlines()) == 1  # only the first process speaks


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "--out", "{tmp}/d", "--prompts", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
        (["data", "--out", "{tmp}/d", "--prompts", "{tmp}/empty.jsonl"], "is empty"),
        (["data", "--out", "{tmp}", "--prompts", "{prompts}"], "neither empty nor a data set"),
        (["run", "--data", "{tmp}", "--run-dir", "{tmp}/r", "--out", "{tmp}/o"], "no data set"),
        (["run", "--data", "{made}", "--run-dir", "{tmp}/r", "--out", "{tmp}/o", "--feature-layers", "a"], "no list"),
        (["run", "--data", "{made}", "--run-dir", "{tmp}/r", "--out", "{tmp}/o", "--sequences", "3",
          "--accumulate", "2"], "do not divide"),
        (["run", "--data", "{made}", "--run-dir", "{tmp}/r", "--out", "{tmp}/o", "--layers", "99"], "99 draft layers"),
        (["run", "--data", "{made}", "--run-dir", "{tmp}/r", "--out", "{tmp}/o", "--cache", "{tmp}/empty.jsonl"],
         "state cache"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(
    tiny_gemma: Path, made: Path, prompts: Path, tmp_path: Path, arguments: list[str], told: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    places = {"tmp": tmp_path, "made": made, "prompts": prompts}
    filled = [argument.format(**places) for argument in arguments]
    if filled[0] == "data":
        filled += ["--count", "4"]
    message = dspark("train", *filled, "--model", str(tiny_gemma), status=1)
    assert told in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_data_of_another_model_is_refused(made: Path, tiny_qwen: Path, tmp_path: Path) -> None:
    message = dspark(*train(tiny_qwen, made, tmp_path), status=1)
    assert "was written by" in message
    assert not (tmp_path / "out").exists()
