"""What worker programs share: exit status and one readable line, signals, their address, and OpenMP's waiting.

Torch-free, since OpenMP's settings are read as torch loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from pydantic import ValidationError
from pydantic_settings import SettingsError

from dspark.errors import StartupError

__all__ = ["address_of", "one_thread", "run", "stop_signal", "wait_briefly"]

# Draft and verify workers often share cores. Threads that spin for long while they wait for their team keep the other
# process off the core for a scheduler quantum at every parallel region; threads that sleep at once pay a wake-up at
# every region (a one-token step of Gemma 3 270M on two cores: 41 ms against 36). 20,000 turns are some 50 µs.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000"}

# mallopt(3): freed buffers of up to 32 MiB (the most it allows) stay with the process, in one arena for all threads. A
# fresh buffer of logits or gathered keys costs a page fault every 4 KiB, which takes longer than filling it.
KEEPING = {-8: 1, -3: 32 << 20, -1: 256 << 20}  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def wait_briefly() -> None:
    """Let OpenMP's threads spin briefly, then sleep, unless the environment says otherwise. Call before torch loads.

    Also has the C library keep freed buffers, where it is glibc.
    """
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(AttributeError, OSError):
        system = ctypes.CDLL(None)
        for option, amount in KEEPING.items():
            system.mallopt(option, amount)


def one_thread(name: str) -> ThreadPoolExecutor:
    """For `with`: the one thread of a program that may run torch, from loading on.

    Every thread that runs parallel regions has a team of its own. Once a program's teams together have more threads
    than there are cores, libgomp has none of them spin at all: a one-token step of Gemma 3 270M took 48 ms in a worker
    whose model was loaded and warmed in another thread, and 33 in the same.
    """
    return ThreadPoolExecutor(1, name)


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


def stop_signal() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; for a running event loop."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def address_of(listen: str, advertise: str | None, port: int) -> str:
    """Where others reach a program: a listening address of all interfaces is nobody's address."""
    host = listen.rpartition(":")[0]
    if host in ("0.0.0.0", "[::]", ""):  # noqa: S104 - recognised, not bound
        host = socket.gethostname()
    return f"{advertise or host}:{port}"
