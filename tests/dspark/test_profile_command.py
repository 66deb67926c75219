"""`dspark profile` in this process, on tiny models."""

import json
import sys
from pathlib import Path

import pytest
import structlog

from dspark.cli import main
from dspark.costs.files import profiles_dir


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DSPARK_PAGES", "96")
    monkeypatch.setenv("DSPARK_MAX_STEP_TOKENS", "8")


def run(model: Path, *arguments: str) -> int:
    common = ["--model", str(model), "--drafter", "ngram", "--dtype", "float32", "--threads", "1", "--seconds", "6"]
    try:
        with pytest.raises(SystemExit) as ended:
            main(["profile", *common, *arguments])
    finally:
        structlog.reset_defaults()
    return int(ended.value.code or 0)


def test_figures_are_measured_once_and_shown(tiny_gemma: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_gemma, "--json") == 0
    verify, draft = json.loads(capsys.readouterr().out)["profiles"]
    assert (verify["kind"], draft["kind"]) == ("verify", "draft")
    assert verify["tokens"] == [1, 2, 3, 4, 6, 8]
    assert draft["contexts"] == [64, 512]
    assert len(verify["envelope"]) == len(verify["contexts"])
    assert {path.stem for path in profiles_dir().glob("*.json")} == {verify["fingerprint"], draft["fingerprint"]}
    assert run(tiny_gemma) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Verify steps, by rows: ms (measured)" in shown
    assert verify["fingerprint"][:12] in shown
    assert f"{1e3 * verify['envelope'][0][0]:.2f} (" in shown
    assert run(tiny_gemma, "--measure", "--json") == 0
    again = json.loads(capsys.readouterr().out)["profiles"]
    assert [new["fingerprint"] for new in again] == [verify["fingerprint"], draft["fingerprint"]]
    assert again[0]["made_at"] > verify["made_at"]


def test_curves_are_drawn(tiny_gemma: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(tiny_gemma, "--plots", str(tmp_path / "plots")) == 0
    verify, draft = ((tmp_path / "plots" / f"profile-{kind}.svg").read_text() for kind in ("verify", "draft"))
    assert "context 64" in verify
    assert "Drafts of whole blocks, by requests" in draft


def test_without_matplotlib_it_says_so_before_it_measures(
    tiny_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(tiny_gemma, "--plots", str(tmp_path)) == 1
    assert "pip install '.[train]'" in capsys.readouterr().err
    assert not profiles_dir().exists()


def test_no_room_is_said(tiny_gemma: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DSPARK_PAGES", "4")
    assert run(tiny_gemma) == 1
    assert "no room" in capsys.readouterr().err
