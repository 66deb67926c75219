"""Which device a worker computes on, and how its use is read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dspark.errors import ConfigError
from dspark.store import Usage, cpu_usage, gpu_usage

__all__ = ["pick_device", "usage_of"]


def pick_device(name: str) -> torch.device:
    """A device by its torch name; "auto" is a GPU where there is one. `ConfigError` for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch sees no GPU")
    return device


def usage_of(device: torch.device) -> Callable[[], Usage]:
    """Reads utilization and memory of the device, or of the processor."""
    return gpu_usage(device.index or 0) if device.type == "cuda" else cpu_usage()
