"""The kernels that models run on, chosen once at start and handed to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dspark.errors import ConfigError
from dspark.kernels import attention, linear, reference
from dspark.kernels.attention import AttentionPlan
from dspark.kernels.linear import Activation, Linear

__all__ = ["TORCH", "Kernels", "select_kernels"]


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything that models compute with; see `dspark.kernels.reference` for the meaning."""

    name: str
    rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    norm_rotary: Callable[[torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor], torch.Tensor]
    write_rows: Callable[[torch.Tensor, AttentionPlan, torch.Tensor, torch.Tensor], None]
    paged_attention: Callable[[torch.Tensor, torch.Tensor, AttentionPlan, float], torch.Tensor]
    linear: Callable[[torch.Tensor], Linear]
    gated: Callable[[torch.Tensor, torch.Tensor, Activation], Linear]


TORCH = Kernels(
    name="torch",
    rms_norm=reference.rms_norm,
    rotary=reference.rotary,
    norm_rotary=reference.norm_rotary,
    write_rows=attention.write_rows,
    paged_attention=attention.paged_attention,
    linear=linear.linear,
    gated=linear.gated,
)


def select_kernels(choice: str, device: torch.device) -> Kernels:
    """The kernels for a device: "auto" or "torch"; ConfigError for what is not there."""
    if choice in ("auto", "torch"):
        return TORCH
    if choice == "triton":
        raise ConfigError(f"kernels: triton kernels for target models are not there yet (device {device.type})")
    raise ConfigError(f"kernels: {choice!r} is not one of auto, torch, triton")
