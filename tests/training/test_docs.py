"""The first run of docs/training.md, command by command as it is printed there, on the real model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "training.md"


def commands() -> list[str]:
    block = re.search(
        r"<!-- the test suite runs this block as it is -->\n```console\n(.*?)```", DOCS.read_text(), re.DOTALL
    )
    assert block is not None
    return [line.removeprefix("$ ") for line in block.group(1).splitlines()]


@pytest.mark.timeout(900)
def test_first_run_goes_as_written(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    written = commands()
    assert len(written) == 6
    for command in written:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)  # noqa: PLW1510
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    config = json.loads((tmp_path / "runs/tiny/drafter/config.json").read_text())
    assert [entry["setting"] for entry in config["calibration"]] == ["coupled"]
    manifest = json.loads((tmp_path / "runs/tiny/data/manifest.json").read_text())
    assert manifest["response_tokens"] > 200
