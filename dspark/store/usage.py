"""How busy this process's device is, for the worker's record."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from dspark.errors import ConfigError

__all__ = ["Usage", "cpu_usage", "gpu_usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Utilization 0 … 1 since the last reading, memory in bytes."""

    utilization: float
    memory_used: int
    memory_total: int


def cpu_usage() -> Callable[[], Usage]:
    """Reads this process's share of the machine's cores, and its resident memory."""
    process = psutil.Process()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    process.cpu_percent()  # the first reading only starts the clock

    def read() -> Usage:
        busy = process.cpu_percent() / 100 / cores
        return Usage(min(busy, 1.0), process.memory_info().rss, psutil.virtual_memory().total)

    return read


def gpu_usage(uuid: str) -> Callable[[], Usage]:
    """Reads a GPU's utilization and memory through NVML, other processes' share included.

    `uuid` as `nvidia-smi -L` shows it. `ConfigError` where there is none to read.
    """
    try:
        import pynvml  # noqa: PLC0415 - only workers on a GPU need it
    except ImportError as error:
        raise ConfigError("reading a GPU's load needs the package nvidia-ml-py (pip install nvidia-ml-py)") from error
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        raise ConfigError(f"GPU {uuid}: {error}") from error

    def read() -> Usage:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return Usage(busy, int(memory.used), int(memory.total))

    return read
