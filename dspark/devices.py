"""Which device a worker computes on and in what numbers, what it is, and how its use is read."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from dspark.errors import ConfigError
from dspark.kernels.linear import fast_bf16
from dspark.store import Usage, cpu_usage, gpu_usage

__all__ = ["pick_device", "pick_dtype", "processor_name", "usage_of"]


def pick_device(name: str) -> torch.device:
    """A device by its torch name; "auto" is a GPU where there is one. `ConfigError` for one that is not here.

    A card with a number becomes the process's present one: kernels and graphs are launched there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch sees no GPU")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"device {name!r}: this torch sees {torch.cuda.device_count()} GPUs, counted from 0")
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 by name; "auto" is the faster one.

    That is bfloat16 but on processors that multiply it one number at a time (no AVX-512, AMX or Arm BF16), which
    compute in float32 over the same weights. `ConfigError` for other names.
    """
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or fast_bf16(device) else torch.float32
    if name not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype {name!r} is not one of auto, bfloat16, float32")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def usage_of(device: torch.device) -> Callable[[], Usage]:
    """Reads utilization and memory of the device, or of the processor."""
    if device.type != "cuda":
        return cpu_usage()
    # NVML counts all cards of the machine, torch those that CUDA_VISIBLE_DEVICES leaves, in an order of its own.
    return gpu_usage(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def processor_name() -> str:
    """The kind of CPU, as exactly as the machine says; its instructions and caches are what this stands for."""
    facts = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    names = ("vendor_id", "model name", "cpu family", "model")
    return " ".join(facts[name] for name in names if name in facts) or platform.processor()
