"""The kernels that models run on, chosen once at start and handed to them."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from dspark.errors import ConfigError
from dspark.kernels import attention, fused, linear, noise, reference, repeated, team
from dspark.kernels.linear import Activation, Linear
from dspark.kernels.logits import TORCH_LOGITS, LogitKernels
from dspark.kernels.noise import KeyedBits
from dspark.kernels.repeated import Repeated
from dspark.kernels.screen import Screen

__all__ = ["TORCH", "Kernels", "Plan", "select_kernels"]

Plan = Any
"""What one implementation's `plan_attention` made; only the same implementation reads it."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything that models compute with.

    `dspark.kernels.reference`, `.fused`, `.attention`, `.linear`, `.noise`, `.logits` and `.repeated` say what each of
    them means.
    `projection` is `linear` for what is not the target's own: float32 weights of a drafter's tap, never rounded.
    `name` is part of the numerics fingerprint; `implementation` is what services choose their own kernels by.
    `kept` is the dtype of a target's keys and values, None for that of its rows. `screen` bounds the logits of a head
    where that pays (`dspark.kernels.screen`), and gives None elsewhere.
    """

    name: str
    implementation: Literal["torch", "llvm", "triton"]
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    norm_rotary: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor], torch.Tensor]
    norm_rotary_write: Callable[..., torch.Tensor]
    plan_attention: Callable[..., Plan]
    paged_attention: Callable[[torch.Tensor, torch.Tensor, Plan, float], torch.Tensor]
    linear: Callable[[torch.Tensor], Linear]
    gated: Callable[[torch.Tensor, torch.Tensor, Activation], Linear]
    projection: Callable[[torch.Tensor], Linear]
    keyed_bits: KeyedBits
    logits: LogitKernels
    repeated: Callable[[], Repeated]
    kept: torch.dtype | None = None
    screen: Callable[[torch.Tensor], Screen | None] = lambda _: None


TORCH = Kernels(
    name="torch",
    implementation="torch",
    rms_norm=reference.rms_norm,
    add_norm=fused.add_norm,
    rotary=reference.rotary,
    norm_rotary=reference.norm_rotary,
    norm_rotary_write=fused.norm_rotary_write,
    plan_attention=attention.plan_attention,
    paged_attention=attention.paged_attention,
    linear=linear.linear,
    gated=linear.gated,
    projection=linear.linear,
    keyed_bits=noise.keyed_bits,
    logits=TORCH_LOGITS,
    repeated=repeated.AtOnce,
)


def select_kernels(choice: str, device: torch.device) -> Kernels:
    """The kernels for a device: "torch", "llvm", "triton", or "auto".

    "auto" is triton on a GPU that has it, llvm on a CPU that can have it, and torch elsewhere. `ConfigError` where one
    is asked for that cannot run.
    """
    if choice not in ("auto", "torch", *_WHY_NOT):
        raise ConfigError(f"kernels: {choice!r} is not one of auto, torch, {', '.join(_WHY_NOT)}")
    if choice == "auto":
        choice = "triton" if device.type == "cuda" else "llvm"
        if _WHY_NOT[choice](device):
            return TORCH
    if choice == "torch":
        return TORCH
    if missing := _WHY_NOT[choice](device):
        raise ConfigError(f"kernels: {choice}: {missing}")
    return _load(choice)


def _load(choice: str) -> Kernels:
    """Kernels that need an extra, imported where they are chosen."""
    if choice == "triton":
        from dspark.kernels.triton_kernels import TRITON  # noqa: PLC0415

        return TRITON
    from dspark.kernels.llvm_kernels import LLVM  # noqa: PLC0415

    return LLVM


def _why_not_llvm(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"its code is a processor's, not a {device.type} device's"
    if importlib.util.find_spec("llvmlite") is None:
        return "the package llvmlite is not installed (it comes with the extra worker)"
    if not team.available():
        return "this torch's threads cannot be reached (no OpenMP with GOMP_parallel)"
    return _why_not_processor()


@lru_cache(maxsize=1)
def _why_not_processor() -> str | None:
    try:
        from llvmlite import binding  # noqa: PLC0415 - an extra
    except (ImportError, OSError) as error:
        return f"llvmlite does not load: {error}"
    features = binding.get_host_cpu_features()
    if platform.machine().lower() in ("x86_64", "amd64") and not features.get("fma"):
        return "this processor has no fused multiply-add"  # each would be a call, and a step take seconds
    return None


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (a CUDA build of torch brings it)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "").lower() not in {"1", "true", "on", "yes", "y"}:
        return (
            f"device {device.type} has none; they need a CUDA device, or TRITON_INTERPRET=1 to be interpreted, slowly"
        )
    return None


_WHY_NOT: dict[str, Callable[[torch.device], str | None]] = {"llvm": _why_not_llvm, "triton": _why_not_triton}
