"""Runs this folder's kernel tests in Triton's interpreter: every kernel against its reference, without a card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
@pytest.mark.parametrize("part", ["shared", "verifier", "draft", "end_to_end"])
def test_kernels_equal_their_references(part: str) -> None:
    pytest.importorskip("triton")
    file = Path(__file__).with_name(f"test_triton_{part}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
