"""The draft service's own kernels, chosen with the shared ones; each kernel beside its torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.kernels import Kernels
from services.draft.context import ContextMemory, KVShape, OwnMemory
from services.draft.drafting import Drafted
from services.draft.kernels import attention, sequential

__all__ = ["DraftKernels", "draft_kernels"]


@dataclass(frozen=True, slots=True)
class DraftKernels:
    """One implementation of what drafting computes beyond `dspark.kernels`.

    `services.draft.kernels.attention` and `.sequential` say what each of them means, `services.draft.context` what
    `memory` does; a plan is read by its maker only.
    """

    memory: Callable[[KVShape, int, torch.dtype, torch.device], ContextMemory]
    plan_block: Callable[..., Any]
    attend: Callable[..., Tensor]
    draft_tokens: Callable[..., Drafted]


_TORCH = DraftKernels(OwnMemory, attention.plan_block, attention.attend, sequential.draft_tokens)


def draft_kernels(shared: Kernels) -> DraftKernels:
    """Those that go with the shared kernels."""
    if shared.implementation == "torch":
        return _TORCH
    if shared.implementation == "llvm":
        from services.draft.kernels import attention_llvm as own  # noqa: PLC0415 - llvmlite is an extra
        from services.draft.kernels import sequential_llvm  # noqa: PLC0415

        return DraftKernels(own.memory, own.plan_block, own.attend, sequential_llvm.draft_tokens)
    from services.draft.kernels import attention_triton, sequential_triton  # noqa: PLC0415 - triton is an extra

    return DraftKernels(OwnMemory, attention_triton.plan_block, attention_triton.attend, sequential_triton.draft_tokens)
