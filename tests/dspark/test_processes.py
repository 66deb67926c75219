import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dspark.processes import Child, spawn

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(grandchild.pid, flush=True)
time.sleep(60)
"""
PARENT = """
import asyncio, sys
from pathlib import Path
from dspark.processes import spawn
async def main():
    child = await spawn("c", ["sleep", "60"], log_path=Path(sys.argv[1]))
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def run(tmp_path: Path, program: str, *args: str) -> Child:
    return await spawn("c", [sys.executable, "-c", program, *args], log_path=tmp_path / "c.log", env={"EXTRA": "1"})


async def first_line(path: Path) -> str:
    async with asyncio.timeout(5):
        while not path.exists() or "\n" not in path.read_text():
            await asyncio.sleep(0.01)
    return path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("print('one'); print('two')", "two"),
        ("pass", ""),
        ('print(\'{"event": "broken", "exception": "Traceback\\\\nValueError: x"}\')', "broken: ValueError: x"),
        ('print(\'{"event": "ready", "address": "a"}\')', "ready"),
        ("import os; print(os.environ['EXTRA'])", "1"),
    ],
)
async def test_the_last_line_tells_what_happened(tmp_path: Path, said: str, heard: str) -> None:
    child = await run(tmp_path, said)
    assert await child.wait(5) == 0
    assert child.last_line() == heard


async def test_a_child_ends_on_its_signal(tmp_path: Path) -> None:
    child = await run(tmp_path, "import time; print('up', flush=True); time.sleep(60)")
    await first_line(child.log_path)
    assert await child.wait(0.01) is None
    assert os.getpgid(child.pid) == child.pid
    assert await child.stop(signal.SIGINT) in {1, -signal.SIGINT}
    assert await child.stop() == child.returncode


async def test_a_stubborn_child_is_killed_with_its_own_children(tmp_path: Path) -> None:
    child = await run(tmp_path, STUBBORN)
    grandchild = int(await first_line(child.log_path))
    assert await child.stop(patience=0.1) == -signal.SIGKILL
    async with asyncio.timeout(2):
        while psutil.pid_exists(grandchild) and psutil.Process(grandchild).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_die_with_us(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


async def test_json_lines_are_its_own_and_complete(tmp_path: Path) -> None:
    (tmp_path / "c.log").write_text('{"earlier": 0}\n')
    program = r"""print('{"a": 1}\nplain\n{broken}\n{"b": 2}\n{"c"', end='')"""
    child = await run(tmp_path, program)
    assert await child.wait(5) == 0
    assert child.json_lines() == [{"a": 1}, {"b": 2}]
