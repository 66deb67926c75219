"""`python -m services.verifier`: a verify worker, from settings to exit status."""

from __future__ import annotations

import asyncio
import os
import sys

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from dspark.errors import StartupError
from dspark.models.pull import resolve_model
from dspark.store import check_store
from dspark.telemetry import configure_logging
from services.verifier.settings import Settings

# Draft and verify workers often share cores. A thread that spins while it waits for its team keeps the other process
# off the core for a scheduler quantum at every parallel region, so waiting threads sleep. Read once, as torch loads.
WAIT_POLICY = {"OMP_WAIT_POLICY": "passive"}


def main() -> int:
    """Run until told to stop. 0, or 1 after one readable line where the worker cannot start."""
    try:
        settings = CliApp.run(Settings)
        configure_logging("verifier", level=settings.log_level, worker_id=settings.worker_id)
        return _serve(settings)
    except (StartupError, SettingsError) as error:
        reason = str(error)
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    sys.stderr.write(f"services.verifier: {reason}\n")
    return 1


def _serve(settings: Settings) -> int:
    check_store(settings.store)  # what can be told at once is told before the long part
    path = resolve_model(settings.model)
    for name, value in WAIT_POLICY.items():
        os.environ.setdefault(name, value)
    from services.verifier.worker import serve_until_told  # noqa: PLC0415 - loads torch, which reads the environment

    asyncio.run(serve_until_told(settings, path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
