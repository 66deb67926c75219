"""The kernels that are compiled for a CPU.

Layers of models in bfloat16, and what these kernels leave out, are torch's. Noise and sampling are compiled for those,
too.
"""

from __future__ import annotations

from dataclasses import replace

from dspark.kernels import TORCH
from dspark.kernels.attention_llvm import paged_attention, plan_attention
from dspark.kernels.linear_llvm import gated, linear
from dspark.kernels.logits_llvm import LLVM_LOGITS
from dspark.kernels.noise_llvm import keyed_bits
from dspark.kernels.repeated_llvm import Programs
from dspark.kernels.rowwise_llvm import add_norm, norm_rotary, norm_rotary_write, rms_norm

__all__ = ["LLVM"]

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
    gated=gated,
    keyed_bits=keyed_bits,
    logits=LLVM_LOGITS,
    repeated=Programs,
)
