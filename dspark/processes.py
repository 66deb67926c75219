"""Child processes that never outlive us: each in a session of its own, its output in a file, killed if we die.

Knows how to start and stop a program; what the program is, and when it is ready, is the caller's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Child", "spawn"]

# Runs in the child before the program replaces it: asks the kernel to kill it with its parent (PR_SET_PDEATHSIG = 1),
# then makes sure that the parent did not die in between. Survives the exec; done here because a preexec function is
# not safe in a process with threads.
_SHIM = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(eq=False)
class Child:
    """A running (or ended) child process."""

    name: str
    process: asyncio.subprocess.Process
    log_path: Path
    log_start: int
    """Where its own lines begin: the file may hold those of an earlier program."""

    @property
    def pid(self) -> int:
        """Its process id, which is its process group's too."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal, None while it runs."""
        return self.process.returncode

    def last_line(self) -> str:
        """The last line it wrote, where the reason for a failed start is; empty if it said nothing."""
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - 8192))
            lines = log.read().decode(errors="replace").strip().splitlines()
            return _readable(lines[-1].strip()) if lines else ""
        return ""

    def json_lines(self) -> list[dict[str, Any]]:
        """The JSON objects among the complete lines that it wrote."""
        text = self.log_path.read_bytes()[self.log_start :].decode(errors="replace")
        lines = (line for line in text.splitlines(keepends=True) if line.startswith("{") and line.endswith("\n"))
        return [value for line in lines if isinstance(value := _loads(line), dict)]

    def send(self, number: int) -> None:
        """Sends a signal to the program alone; nothing happens if it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def wait(self, seconds: float) -> int | None:
        """Its exit status, or None if it still runs after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.process.wait()
        return self.returncode

    async def stop(self, number: int = signal.SIGTERM, *, patience: float = 5.0) -> int:
        """Signals it, waits, and after `patience` seconds kills its whole group. Returns the exit status."""
        self.send(number)
        status = await self.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return status if status is not None else await self.process.wait()


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _readable(line: str) -> str:
    """Of a JSON log line, what happened; any other line as it is."""
    value = _loads(line)
    if not isinstance(value, dict) or "event" not in value:
        return line
    trouble = str(value.get("exception") or value.get("error") or "").strip().splitlines()
    return ": ".join([str(value["event"]), *trouble[-1:]])


async def spawn(
    name: str, command: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Child:
    """Starts `command` with its output appended to `log_path`. `env` is added to our own environment."""
    shim = [sys.executable, "-S", "-E", "-c", _SHIM, str(os.getpid())]
    with log_path.open("ab") as log:
        start = log.tell()
        process = await asyncio.create_subprocess_exec(
            *shim,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
    return Child(name, process, log_path, start)
