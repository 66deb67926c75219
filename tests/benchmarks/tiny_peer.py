"""The least peer there is: a script that counts on from a prompt's last id. Its argument says how it misbehaves."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.peering.runners.line_protocol import serve


class Counting:
    def __init__(self, fault: str) -> None:
        self._fault = fault

    def load(self, **request: Any) -> dict[str, Any]:
        print("this goes to the log, not to whoever waits for an answer")
        os.system("echo so does this")
        if self._fault == "load":
            raise RuntimeError("no room\nfor the model")
        if self._fault == "child":
            request["child"] = subprocess.Popen(["sleep", "60"]).pid
        return {"engine": "counting 1", "settings": request}

    def run(self, *, prompts: Sequence[Sequence[int]], max_tokens: int, **_: Any) -> list[list[int]]:
        if self._fault == "run":
            raise ValueError("too many prompts")
        if self._fault == "die":
            sys.stderr.write("out of memory\n")
            os._exit(3)
        return [list(range(ids[-1] + 1, ids[-1] + 1 + max_tokens)) for ids in prompts[self._fault == "lose" :]]


if __name__ == "__main__":
    if sys.argv[1:] == ["import"]:
        import engine_that_nobody_installed  # type: ignore[import-not-found]  # noqa: F401
    if sys.argv[1:] == ["babble"]:
        sys.stdout.write("hello\n")
        sys.stdout.flush()
    if sys.argv[1:] == ["sleep"]:
        import time

        time.sleep(60)
    serve(Counting("".join(sys.argv[1:])))
