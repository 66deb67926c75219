"""What worker programs share: settings to exit status, one readable line where one cannot start, and OpenMP's waiting.

Torch-free, since OpenMP's settings are read as torch loads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pydantic import ValidationError
from pydantic_settings import SettingsError

from dspark.errors import StartupError

__all__ = ["run", "wait_briefly"]

# Draft and verify workers often share cores. Threads that spin for long while they wait for their team keep the other
# process off the core for a scheduler quantum at every parallel region; threads that sleep at once pay a wake-up at
# every region (a one-token step of Gemma 3 270M on two cores: 41 ms against 36). 20,000 turns are some 50 µs.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}


def wait_briefly() -> None:
    """Let OpenMP's threads spin briefly, then sleep, unless the environment says otherwise. Call before torch loads."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)


def run(name: str, work: Callable[[], None]) -> int:
    """Do the work. 0, or 1 after one readable line on stderr where settings are wrong or the program cannot start."""
    try:
        work()
    except (StartupError, SettingsError) as error:
        reason = str(error)
    except ValidationError as error:
        reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    else:
        return 0
    sys.stderr.write(f"{name}: {reason}\n")
    return 1
