"""`python -m benchmarks.peers` as it is run: a cluster of ours, transformers and the least peer there is."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.peers import main

SCRIPT = Path(__file__).parent / "tiny_peer.py"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"one and {n}"]}) + "\n" for n in range(4)))
    return path


def test_engines_are_compared_in_one_run(
    prompts: Path, tiny_qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    line = ["--prompts", str(prompts), "--model", str(tiny_qwen), "--drafter", "ngram", "--policy", "fixed:2"]
    line += ["--peer", f"tiny={sys.prefix}", "--runner", f"tiny={SCRIPT}", "--peer", f"transformers={sys.prefix}"]
    line += ["--streams", "1", "2", "--requests", "2", "--repeats", "2", "--max-tokens", "6", "--threads", "1"]
    assert main([*line, "--json", str(report), "--log-dir", str(tmp_path / "logs")]) == 0
    facts = json.loads(report.read_text())
    assert facts["machine"]["cores"] >= 1
    assert facts["engines"]["dspark"]["settings"]["policy"] == "fixed:2"
    assert facts["engines"]["tiny"]["engine"] == "counting 1"
    assert facts["engines"]["transformers"]["engine"].startswith("transformers ")
    assert len(facts["turns"]) == 2 * 2 * 2 * 3
    assert {turn["tokens"] for turn in facts["turns"]} == {12}
    compared = [row for row in facts["rows"] if row["engine"] != "dspark"]
    assert len(compared) == 2 * 2 * 2
    assert all(row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"] for row in compared)
    shown = capsys.readouterr().out
    assert "ours over it" in shown
    assert "tiny: counting 1" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--peer", "vllm=/nowhere"], "--peer vllm=/nowhere: there is no /nowhere/bin/python; docs/peers.md says"),
        (["--peer", "vllm"], "--peer vllm: NAME=PATH is needed"),
        (["--peer", "sglang=/x"], "--peer sglang: known are vllm, "),
        (["--runner", "mine=/no.py"], "/no.py: there is no such file"),
        (["--gguf", "/no.gguf"], "/no.gguf: there is no such file"),
        (["--requests", "1", "2"], "--requests has 2 numbers, but --streams 3"),
        (["--policy", "fast"], "policy 'fast' is none of"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(
    options: list[str], said: str, prompts: Path, tiny_qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompts", str(prompts), "--model", str(tiny_qwen), *options]) == 1
    assert f"peers: {said}" in capsys.readouterr().err
