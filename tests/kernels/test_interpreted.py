"""Runs this folder's kernel tests without a card: against their references in Triton's interpreter, and its compiler.

Both are processes of their own: Triton reads TRITON_INTERPRET when kernels are declared.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
HERE = Path(__file__).parent


def run(*arguments: str, **variables: str) -> str:
    pytest.importorskip("triton")
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)  # on a machine with other work
def test_kernels_equal_their_references() -> None:
    files = map(str, sorted(HERE.glob("test_triton_*.py")))
    output = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert " passed" in output
    assert "skipped" not in output
    assert "deselected" not in output


def test_kernels_compile_for_a_card() -> None:
    """What Triton compiled before it keeps, so that this is slow once."""
    compiled = run(str(HERE / "compiling.py"), "80", PYTHONPATH=os.pathsep.join(sys.path)).split()
    services = {"tile_kernel", "judge_kernel", "walk_kernel", "_choose_kernel"}
    assert services | {"_linear_kernel", "_attention_kernel"} <= set(compiled)
