"""`python -m services.pair`: a verify worker and a draft worker, from settings to exit status."""

from __future__ import annotations

import asyncio
import sys

from dspark import program
from services.pair.settings import Settings
from services.verifier.beginning import begin


def main() -> int:
    """Run until told to stop. 0, or 1 after one readable line where the workers cannot start."""
    return program.run("services.pair", _serve)


def _serve() -> None:
    settings, path = begin(Settings, "pair")
    from services.pair.serving import serve_until_told  # noqa: PLC0415 - loads torch, which reads the environment

    asyncio.run(serve_until_told(settings, path))


if __name__ == "__main__":
    sys.exit(main())
