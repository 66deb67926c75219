"""Which device a worker computes on and in what numbers, what it is, and how its use is read."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspark.errors import ConfigError
from dspark.kernels import Kernels, select_kernels
from dspark.kernels.linear import fast_bf16
from dspark.store import Usage, cpu_usage, gpu_usage

__all__ = ["Numerics", "drafting", "pick_device", "pick_dtype", "pick_numerics", "processor_name", "usage_of"]


_X86 = ("x86_64", "amd64")


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


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a model is served in: kernels, the dtype of its tensors, and that of what its products multiply."""

    kernels: Kernels
    dtype: torch.dtype
    products: torch.dtype


def pick_numerics(kernels: str, dtype: str, device: torch.device, *, weights: str = "plain") -> Numerics:
    """Kernels as `select_kernels` chooses them, and the numbers for a `dtype` of bfloat16, float32 or auto.

    Compiled kernels multiply bfloat16 where an x86 processor does (AVX512-BF16) and keep all between two products in
    float32; elsewhere "auto" is float32 for them. Other kernels have tensors of the dtype, as `pick_dtype` says.
    `weights` may be "int8" where compiled kernels have the instructions, and "auto" is that where they multiply
    bfloat16 otherwise. `ConfigError` for what does not go together.
    """
    own = select_kernels(kernels, device)
    if weights == "int8":
        return _int8(own, dtype, device)
    plain = _plain(own, dtype, device)
    return plain if weights == "plain" else replace(plain, kernels=drafting(plain.kernels))


def drafting(kernels: Kernels) -> Kernels:
    """What a draft worker computes with unless told otherwise, where a target is served with these kernels.

    That is int8 weights where products are of bfloat16 and the processor has the instructions: drafts decide nothing
    but how many of them are accepted.
    """
    if kernels.implementation != "llvm":
        return kernels
    from dspark.kernels.llvm_kernels import INT8, ROUNDED, multiplies_int8  # noqa: PLC0415 - needs an extra

    return INT8 if kernels is ROUNDED and multiplies_int8() else kernels


def _plain(own: Kernels, dtype: str, device: torch.device) -> Numerics:
    asked = pick_dtype(dtype, device)
    if own.implementation == "llvm" and dtype != "float32" and platform.machine().lower() in _X86:
        from dspark.kernels.llvm_kernels import ROUNDED, multiplies_bfloat16  # noqa: PLC0415 - needs an extra

        if multiplies_bfloat16():
            return Numerics(ROUNDED, torch.float32, torch.bfloat16)
        asked = torch.float32 if dtype == "auto" else asked
    return Numerics(own, asked, asked)


def _int8(kernels: Kernels, dtype: str, device: torch.device) -> Numerics:
    if dtype == "float32":
        raise ConfigError("weights: int8 goes with dtype bfloat16, not float32")
    if kernels.implementation != "llvm":
        raise ConfigError(f"weights: int8 needs compiled kernels on a CPU, not {kernels.name} on {device.type}")
    from dspark.kernels.llvm_kernels import INT8, multiplies_int8  # noqa: PLC0415 - needs an extra

    if not multiplies_int8():
        raise ConfigError("weights: int8 needs a processor with AVX512-VNNI instructions")
    return Numerics(INT8, torch.float32, torch.bfloat16)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 by name; "auto" is the one in which torch's own operators are faster.

    That is bfloat16 but on processors that multiply it one number at a time (no AVX-512, AMX or Arm BF16).
    `ConfigError` for other names.
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
