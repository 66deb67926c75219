"""The Triton kernels as one `Kernels` object. Imported only where they are chosen: triton is an extra."""

from __future__ import annotations

import triton

from dspark.kernels import Kernels
from dspark.kernels.attention_triton import paged_attention, plan_attention
from dspark.kernels.linear_triton import gated, linear
from dspark.kernels.logits import TORCH_LOGITS
from dspark.kernels.noise import keyed_bits
from dspark.kernels.parts_triton import INTERPRETED
from dspark.kernels.repeated import AtOnce
from dspark.kernels.rowwise_triton import add_norm, norm_rotary, norm_rotary_write, rms_norm, rotary

__all__ = ["TRITON"]

TRITON = Kernels(
    # Part of the numerics fingerprint: another release may order a product's sums differently.
    name=f"triton {triton.__version__}{' interpreted' if INTERPRETED.value else ''}",
    implementation="triton",
    rms_norm=rms_norm,
    add_norm=add_norm,
    rotary=rotary,
    norm_rotary=norm_rotary,
    norm_rotary_write=norm_rotary_write,
    plan_attention=plan_attention,
    paged_attention=paged_attention,
    linear=linear,
    gated=gated,
    projection=linear,
    logits=TORCH_LOGITS,
    repeated=AtOnce,
    keyed_bits=keyed_bits,  # of choices made outside the fused kernels
)
