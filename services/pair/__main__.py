"""`python -m services.pair`: a verify worker and a draft worker, from settings to exit status."""

from __future__ import annotations

import asyncio
import sys

from pydantic_settings import CliApp

from dspark import program
from dspark.models.pull import resolve_model
from dspark.store import check_store
from dspark.telemetry import configure_logging
from services.pair.settings import Settings


def main() -> int:
    """Run until told to stop. 0, or 1 after one readable line where the workers cannot start."""
    return program.run("services.pair", _serve)


def _serve() -> None:
    settings = CliApp.run(Settings)
    configure_logging("pair", level=settings.log_level, worker_id=settings.worker_id)
    check_store(settings.store)  # what can be told at once is told before the long part
    path = resolve_model(settings.model)
    program.wait_briefly()
    from services.pair.serving import serve_until_told  # noqa: PLC0415 - loads torch, which reads the environment

    asyncio.run(serve_until_told(settings, path))


if __name__ == "__main__":
    sys.exit(main())
