"""The draft service's own kernels, chosen with the shared ones; each kernel beside its torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dspark.kernels import Kernels
from services.draft.drafting import Drafted
from services.draft.kernels import attention, sequential

__all__ = ["DraftKernels", "draft_kernels"]


@dataclass(frozen=True, slots=True)
class DraftKernels:
    """One implementation of what drafting computes beyond `dspark.kernels`.

    `services.draft.kernels.attention` and `.sequential` say what each of them means; a plan is read by its maker only.
    """

    plan_block: Callable[..., Any]
    block_attention: Callable[[Tensor, Tensor, Tensor, Any, int], Tensor]
    draft_tokens: Callable[..., Drafted]


_TORCH = DraftKernels(attention.plan_block, attention.block_attention, sequential.draft_tokens)


def draft_kernels(shared: Kernels) -> DraftKernels:
    """Those that go with the shared kernels."""
    if shared.implementation == "torch":
        return _TORCH
    if shared.implementation == "llvm":
        from services.draft.kernels import attention_llvm, sequential_llvm  # noqa: PLC0415 - llvmlite is an extra

        return DraftKernels(attention_llvm.plan_block, attention_llvm.block_attention, sequential_llvm.draft_tokens)
    from services.draft.kernels import attention_triton, sequential_triton  # noqa: PLC0415 - triton is an extra

    return DraftKernels(attention_triton.plan_block, attention_triton.block_attention, sequential_triton.draft_tokens)
