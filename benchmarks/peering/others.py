"""How much of the processors programs outside a measurement take: what makes a figure from a shared machine doubtful.

An engine whose threads wait for each other at every layer loses far more than the share that others take, and engines
differ in that: a ratio from a busy machine may say more about the neighbours than about the engines.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil

__all__ = ["Others"]


def _busy() -> float:
    """Processor seconds that the whole machine has worked so far, those stolen from it by its host included."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(float(getattr(times, name, 0.0)) for name in names)


def _own() -> float:
    """Processor seconds of this process and all its descendants; those that have ended no longer count."""
    me = psutil.Process()
    seconds = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


@dataclass(slots=True)
class Others:
    """Counts from when it is made. Ticks are hundredths of a second: of little use below half a second."""

    _began: float = field(default_factory=time.monotonic)
    _busy: float = field(default_factory=_busy)
    _own: float = field(default_factory=_own)

    def share(self) -> float:
        """Of all processors, 0 to 1."""
        cores = psutil.cpu_count() or 1
        seconds = cores * (time.monotonic() - self._began)
        return max(0.0, (_busy() - self._busy) - (_own() - self._own)) / seconds if seconds > 0 else 0.0
