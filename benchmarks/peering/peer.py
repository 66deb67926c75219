"""A peer: another engine in a process of its own, run by the Python of its own virtual environment.

Speaks the line protocol of `benchmarks.peering.runners.line_protocol`. Between its turns the whole process group is
stopped (SIGSTOP): an engine's threads spin for a while after each step, some engines poll all the time, and on a small
machine whoever has the turn would pay for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peering.engine import Answer, checked
from benchmarks.peering.workload import Work
from dspark.errors import ConfigError, StartupError, Unavailable

__all__ = ["RUNNERS", "Peer", "find_python"]

_ROOT = Path(__file__).parents[2]
_SCRIPTS = Path(__file__).parent / "runners"
RUNNERS: Mapping[str, Sequence[str]] = {
    "vllm": (str(_SCRIPTS / "vllm_cpu.py"),),
    "vllm-as-installed": (str(_SCRIPTS / "vllm_cpu.py"), "--as-installed"),
    "llama-cpp": (str(_SCRIPTS / "llama_cpp_python.py"),),
    "transformers": (str(_SCRIPTS / "transformers_generate.py"),),
}
"""The script of each peer that is known by name, with its arguments."""
HOW = "docs/peers.md says how its environment is built"

_LINE_BYTES = 1 << 26
_END_SECONDS = 10.0


def find_python(name: str, environment: Path) -> Path:
    """The interpreter of a peer's environment; `ConfigError` where there is none."""
    python = environment / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise ConfigError(f"--peer {name}={environment}: there is no {python}; {HOW}")
    return python.absolute()  # not resolved: the link is what makes it that environment's


@dataclass(eq=False)
class Peer:
    """An engine for `async with`.

    Args:
        name: what tables call it.
        command: interpreter, script and arguments.
        request: what `load` is told, see the protocol.
        log_path: where everything goes that it prints.
        patience: seconds that a load or a turn may take.

    Raises:
        StartupError: it could not be loaded; Unavailable: it failed later. One line, with its own last words.
    """

    name: str
    command: Sequence[str]
    request: Mapping[str, Any]
    log_path: Path
    patience: float = 900.0
    _facts: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it said when it was loaded."""
        return self._facts

    async def __aenter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LINE_BYTES,
                env=_environment(),
                start_new_session=True,
            )
        try:
            self._facts = await self._ask({"do": "load", **self.request})
        except Unavailable as error:
            await self._end()
            raise StartupError(f"{error}; {HOW}") from error
        except BaseException:
            await self._end()
            raise
        self._signal(signal.SIGSTOP)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def run(self, work: Work) -> Answer:
        """One turn, between being woken and being stopped again."""
        self._signal(signal.SIGCONT)
        try:
            said = await self._ask({"do": "run", **asdict(work)})
        finally:
            self._signal(signal.SIGSTOP)
        tokens, seconds = said.get("tokens"), said.get("seconds")
        if not isinstance(tokens, list) or not isinstance(seconds, int | float):
            raise Unavailable(f"{self.name} answered a run without tokens and seconds")
        return checked(self.name, work, Answer(tuple(map(tuple, tokens)), float(seconds)))

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            async with asyncio.timeout(self.patience):
                stdin.write(json.dumps(request).encode() + b"\n")
                await stdin.drain()
                line = await stdout.readline()
        except TimeoutError as error:
            raise Unavailable(f"{self.name} took more than {self.patience:g} s to {request['do']}") from error
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        return self._understood(line) if line else await self._gone()

    def _understood(self, line: bytes) -> dict[str, Any]:
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Unavailable(f"{self.name} said {line[:80]!r}, which is no JSON object")
        if "error" in said:
            raise Unavailable(f"{self.name}: {said['error']} (log: {self.log_path})")
        return said

    async def _gone(self) -> Any:
        status = await self._process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        raise Unavailable(f"{self.name} {how}: {self._last_words()} (log: {self.log_path})")

    def _last_words(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it said nothing"

    def _signal(self, number: int) -> None:
        """To all its processes: it leads a group of its own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _end(self) -> None:
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        self._signal(signal.SIGKILL)
        await self._process.wait()


def _environment() -> dict[str, str]:
    """Ours, with the repository to import the protocol from, and without what would lead it to our own packages."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONHOME", "VIRTUAL_ENV"}}
    return kept | {"PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"}
