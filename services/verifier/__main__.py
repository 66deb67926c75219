"""`python -m services.verifier`: a verify worker, from settings to exit status."""

from __future__ import annotations

import asyncio
import sys

from dspark import program
from services.verifier.beginning import begin
from services.verifier.settings import Settings


def main() -> int:
    """Run until told to stop. 0, or 1 after one readable line where the worker cannot start."""
    return program.run("services.verifier", _serve)


def _serve() -> None:
    settings, path = begin(Settings, "verifier")
    from services.verifier.worker import serve_until_told  # noqa: PLC0415 - loads torch, which reads the environment

    asyncio.run(serve_until_told(settings, path))


if __name__ == "__main__":
    sys.exit(main())
