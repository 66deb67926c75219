"""The program of docs/client.md that starts a cluster of its own runs as it stands."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "client.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.model
async def test_the_program_that_starts_a_cluster_runs() -> None:
    (program,) = [program for program in PROGRAMS if "Cluster(" in program]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-W", "error", "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0, err.decode()
    assert len(out.decode().splitlines()) >= 2
