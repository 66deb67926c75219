"""The verify service's own kernels, chosen with the shared ones; each Triton kernel beside its torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from dspark.kernels import Kernels
from services.verifier.candidates import Outcome
from services.verifier.kernels import features
from services.verifier.verification import verify

__all__ = ["VerifierKernels", "verifier_kernels"]


@dataclass(frozen=True, slots=True)
class VerifierKernels:
    """One implementation of what verification computes beyond `dspark.kernels`.

    `services.verifier.verification` and `services.verifier.kernels.features` say what each of them means.
    `screened` is verification for a head whose logits are bounded first: `services.verifier.kernels.screened_llvm`.
    """

    verify: Callable[..., list[Outcome]]
    tap_inputs: Callable[..., Tensor]
    tap_outputs: Callable[..., Tensor]
    screened: Callable[..., list[Outcome]] | None = None


_TORCH = VerifierKernels(verify, features.tap_inputs, features.tap_outputs)


def verifier_kernels(shared: Kernels) -> VerifierKernels:
    """Those that go with the shared kernels."""
    reference = partial(verify, bits=shared.keyed_bits, passes=shared.logits)
    if shared.implementation == "torch":
        return replace(_TORCH, verify=reference)
    if shared.implementation == "llvm":
        from services.verifier.kernels import features_llvm, screened_llvm, verify_llvm  # noqa: PLC0415 - an extra

        own = partial(verify_llvm.verify, reference=reference)
        screened = partial(screened_llvm.verify, by_logits=own, passes=shared.logits)
        return VerifierKernels(own, features_llvm.tap_inputs, features_llvm.tap_outputs, screened)
    from services.verifier.kernels import features_triton, verify_triton  # noqa: PLC0415 - triton is an extra

    return VerifierKernels(verify_triton.verify, features_triton.tap_inputs, features_triton.tap_outputs)
