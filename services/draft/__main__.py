"""`python -m services.draft`: a draft worker, from settings to exit status."""

from __future__ import annotations

import asyncio
import sys

from pydantic_settings import CliApp

from dspark import program
from dspark.telemetry import configure_logging
from services.draft.settings import Settings


def main() -> int:
    """Run until told to stop. 0, or 1 after one readable line where the worker cannot start."""
    return program.run("services.draft", _serve)


def _serve() -> None:
    settings = CliApp.run(Settings)
    configure_logging("draft", level=settings.log_level, worker_id=settings.worker_id)
    program.wait_briefly()
    from services.draft.serving import serve_until_told  # noqa: PLC0415 - loads torch, which reads the environment

    asyncio.run(serve_until_told(settings))


if __name__ == "__main__":
    sys.exit(main())
