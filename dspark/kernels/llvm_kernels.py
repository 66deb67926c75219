"""The kernels that are compiled for a CPU.

Layers of models in bfloat16, and what these kernels leave out, are torch's. Noise and sampling are compiled for those,
too. `ROUNDED` and `INT8` multiply bfloat16 and bytes in models whose tensors are float32, where the processor does, and
keep keys and values in bfloat16: an attention of few rows takes as long as reading them. `ROUNDED` bounds the logits of
large heads by bytes where the processor multiplies these, too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dspark.kernels import TORCH, linear_int8
from dspark.kernels.attention_llvm import paged_attention, plan_attention
from dspark.kernels.linear_llvm import gated, linear, rounded_gated, rounded_linear
from dspark.kernels.logits_llvm import LLVM_LOGITS
from dspark.kernels.noise_llvm import keyed_bits
from dspark.kernels.product_llvm import compiled
from dspark.kernels.repeated_llvm import Programs
from dspark.kernels.rowwise_llvm import add_norm, norm_rotary, norm_rotary_write, rms_norm
from dspark.kernels.screen_llvm import screen

__all__ = ["INT8", "LLVM", "ROUNDED", "multiplies_bfloat16", "multiplies_int8"]

LLVM = replace(
    TORCH,
    name="llvm",
    implementation="llvm",
    rms_norm=rms_norm,
    add_norm=add_norm,
    norm_rotary=norm_rotary,
    norm_rotary_write=norm_rotary_write,
    plan_attention=plan_attention,
    paged_attention=paged_attention,
    linear=linear,
    projection=linear,
    gated=gated,
    keyed_bits=keyed_bits,
    logits=LLVM_LOGITS,
    repeated=Programs,
)
ROUNDED = replace(
    LLVM, name="llvm-bfloat16", linear=rounded_linear, gated=rounded_gated, kept=torch.bfloat16, screen=screen
)
INT8 = replace(LLVM, name="llvm-int8", linear=linear_int8.linear, gated=linear_int8.gated, kept=torch.bfloat16)


def multiplies_bfloat16() -> bool:
    """Whether the processor at hand can have `ROUNDED`, whose choices rest on bytes, too."""
    return None not in (compiled().dots, compiled().bounded_codes)


def multiplies_int8() -> bool:
    """Whether the processor at hand can have `INT8`."""
    return compiled().codes is not None
