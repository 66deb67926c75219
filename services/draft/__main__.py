"""`python -m services.draft`: a draft worker, from settings to exit status."""

from __future__ import annotations

import asyncio
import os
import sys

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from dspark.errors import StartupError
from dspark.telemetry import configure_logging
from services.draft.settings import Settings

# A thread that spins while it waits for its team keeps a verify worker on the same cores off them for a scheduler
# quantum at every parallel region, so waiting threads sleep. Read once, as torch loads.
WAIT_POLICY = {"OMP_WAIT_POLICY": "passive"}


def main() -> int:
    """Run until told to stop. 0, or 1 after one readable line where the worker cannot start."""
    try:
        settings = CliApp.run(Settings)
        configure_logging("draft", level=settings.log_level, worker_id=settings.worker_id)
        return _serve(settings)
    except (StartupError, SettingsError) as error:
        reason = str(error)
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    sys.stderr.write(f"services.draft: {reason}\n")
    return 1


def _serve(settings: Settings) -> int:
    for name, value in WAIT_POLICY.items():
        os.environ.setdefault(name, value)
    from services.draft.serving import serve_until_told  # noqa: PLC0415 - loads torch, which reads the environment

    asyncio.run(serve_until_told(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
