"""The peer's side of the line protocol: one JSON object a line in, one out. Standard library only.

    {"do": "load", "model": DIR, "gguf": FILE or null, "threads": N, "streams": [N, …], "context": N}
    {"do": "run", "prompts": [[ID, …], …], "streams": N, "temperature": T, "max_tokens": N, "seed": S}

`load` is answered with facts about the engine (`engine`: name and version; anything else), `run` with the generated ids
of each prompt and the seconds it took; a failure with `{"error": "one line"}`. The end of stdin ends the process.

What an engine is measured under is the same for all: never more than `streams` requests at a time and the next one at
once, `max_tokens` tokens each whatever they are (the end-of-sequence token ends nothing), temperature alone shapes the
distribution, and nothing is kept from one run for the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, TextIO

__all__ = ["Engine", "serve"]

_PDEATHSIG = 1  # of prctl: the signal that comes when the parent has ended


class Engine(Protocol):
    """What a runner script brings."""

    def load(self, *, model: str, gguf: str | None, threads: int, streams: Sequence[int], context: int) -> Any:
        """Make ready for any of these numbers of streams and for `context` tokens each; facts as a dictionary."""

    def run(
        self, *, prompts: Sequence[Sequence[int]], streams: int, temperature: float, max_tokens: int, seed: int
    ) -> Any:
        """The generated ids of each prompt, in the prompts' order. Prompt i is sampled with seed + i."""


def serve(engine: Engine) -> None:
    """Answers until stdin ends."""
    _end_together()
    answers = _own_stdout()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(engine, json.loads(line))) + "\n")
        answers.flush()


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    todo = request.pop("do")
    try:
        if todo == "load":
            return dict(engine.load(**request))
        began = time.perf_counter()
        tokens = engine.run(**request)
        return {"tokens": tokens, "seconds": time.perf_counter() - began}
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def _own_stdout() -> TextIO:
    """Stdout for answers alone: what engines and their libraries print goes to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _end_together() -> None:
    """We end with our parent, and our group with us. Paused, neither we nor processes of ours would notice an end."""
    if sys.platform != "linux":
        return
    group = os.getpid()
    if os.fork() == 0:
        _kill_after(group)
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def _kill_after(leader: int) -> NoReturn:
    """Outside the group, so that it is never paused itself."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() == leader:
        signal.sigwait({signal.SIGUSR1})
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    os._exit(0)
