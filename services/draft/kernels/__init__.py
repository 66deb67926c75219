"""The draft service's own kernels, chosen with the shared ones; each kernel beside its torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.kernels.linear import Linear
from services.draft.context import ContextMemory, KVShape, OwnMemory
from services.draft.drafting import Drafted
from services.draft.kernels import attention, sequential

__all__ = ["DraftKernels", "draft_kernels"]


@dataclass(frozen=True, slots=True)
class DraftKernels:
    """One implementation of what drafting computes beyond `dspark.kernels`.

    `services.draft.kernels.attention` and `.sequential` say what each of them means, `services.draft.context` what
    `memory` does; a plan is read by its maker only. `spiky` is the shared `linear` for inputs of which a few are far
    larger than the rest: bytes, with one scale a row, would hold little of those, so it never rounds to int8.
    """

    memory: Callable[[KVShape, int, torch.dtype, torch.device], ContextMemory]
    inject: Callable[..., None]
    plan_block: Callable[..., Any]
    attend: Callable[..., Tensor]
    draft_tokens: Callable[..., Drafted]
    spiky: Callable[[Tensor], Linear]


def draft_kernels(shared: Kernels) -> DraftKernels:
    """Those that go with the shared kernels."""
    if shared.implementation == "torch":
        return DraftKernels(
            OwnMemory,
            attention.inject,
            attention.plan_block,
            attention.attend,
            sequential.draft_tokens,
            shared.linear,
        )
    if shared.implementation == "llvm":
        from dspark.kernels.llvm_kernels import INT8, ROUNDED  # noqa: PLC0415 - llvmlite is an extra
        from services.draft.kernels import attention_llvm, sequential_llvm  # noqa: PLC0415

        return DraftKernels(
            attention_llvm.memory,
            attention_llvm.inject,
            attention_llvm.plan_block,
            attention_llvm.attend,
            sequential_llvm.draft_tokens,
            ROUNDED.linear if shared is INT8 else shared.linear,
        )
    from services.draft.kernels import attention_triton, sequential_triton  # noqa: PLC0415 - triton is an extra

    return DraftKernels(
        OwnMemory,
        attention_triton.inject,
        attention_triton.plan_block,
        attention_triton.attend,
        sequential_triton.draft_tokens,
        shared.linear,
    )
