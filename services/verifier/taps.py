"""Taps: drafters' projections of this target's hidden states. Knows what fits the target and the arithmetic.

A tap comes with a drafter and is registered by a draft worker. `features.py` keeps what taps compute.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Final

import torch
from torch import Tensor

from dspark.errors import InvalidRequest, Mismatch
from dspark.kernels import Kernels
from dspark.messages import ModelInfo, TapInfo
from services.verifier.kernels import verifier_kernels

__all__ = ["BIAS", "NORM", "PROJECTION", "Tap", "check_info", "tap_digest", "tensor_shapes", "tensors_of"]

PROJECTION: Final = "fc.weight"
BIAS: Final = "fc.bias"
NORM: Final = "hidden_norm.weight"
MAX_FEATURE_SIZE: Final = 65_536


def check_info(info: TapInfo, model: ModelInfo) -> None:
    """`Mismatch` unless the tap reads hidden states that this target has.

    The last layer is refused: frameworks store it normalised, so two sides may mean different things by it.
    """
    if info.model_fingerprint and info.model_fingerprint != model.model_fingerprint:
        raise Mismatch(
            f"the tap is for the target {info.model_fingerprint[:12]}…, this is {model.model_fingerprint[:12]}…"
        )
    if info.target_hidden_size != model.hidden_size:
        raise Mismatch(f"target_hidden_size {info.target_hidden_size}: this target has {model.hidden_size}")
    if info.target_vocab_size != model.vocab_size:
        raise Mismatch(f"target_vocab_size {info.target_vocab_size}: this target has {model.vocab_size}")
    _check_layers(info.layer_ids, model.num_layers)
    if not 1 <= info.feature_size <= MAX_FEATURE_SIZE:
        raise InvalidRequest(f"feature_size {info.feature_size} is outside 1 to {MAX_FEATURE_SIZE}")
    if not 0.0 < info.norm_eps < 1.0:
        raise InvalidRequest(f"norm_eps {info.norm_eps} is outside (0, 1)")


def _check_layers(layer_ids: tuple[int, ...], num_layers: int) -> None:
    if not layer_ids or len(set(layer_ids)) != len(layer_ids):
        raise InvalidRequest(f"layer_ids {list(layer_ids)}: expected at least one, each once")
    for layer in layer_ids:
        if not -1 <= layer < num_layers - 1:
            raise Mismatch(f"layer_ids: {layer} is outside -1 to {num_layers - 2}, the layers a tap may read here")


def tensor_shapes(info: TapInfo) -> dict[str, tuple[int, ...]]:
    """The tensors a tap has, all float32; `fc.bias` may be left out."""
    inputs = len(info.layer_ids) * info.target_hidden_size
    return {PROJECTION: (info.feature_size, inputs), NORM: (info.feature_size,), BIAS: (info.feature_size,)}


def tensors_of(info: TapInfo, parts: Mapping[str, bytes]) -> dict[str, Tensor]:
    """A tap's tensors from the float32 bytes in which they come, of the right sizes."""
    shapes = tensor_shapes(info)
    return {
        name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shapes[name])
        for name, data in parts.items()
    }


def tap_digest(info: TapInfo, tensors: Mapping[str, Tensor]) -> str:
    """What `tap_id` has to be: sha256 over the description as sorted JSON, then each tensor's name and bytes."""
    fields = {name: value for name, value in asdict(info).items() if name != "tap_id"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Tap:
    """RMSNorm(W_c [H^(l_1); …; H^(l_m)]) with a drafter's W_c and norm (DSpark §2.2)."""

    def __init__(
        self, info: TapInfo, tensors: Mapping[str, Tensor], kernels: Kernels, device: torch.device | str = "cpu"
    ) -> None:
        """`tensors`: float32, named and shaped as `tensor_shapes` says. `InvalidRequest` where they are not."""
        _check_tensors(info, tensors)
        self.info = info
        self._kernels = verifier_kernels(kernels)
        self._project = kernels.projection(tensors[PROJECTION].to(device))
        self._bias = tensors[BIAS].to(device) if BIAS in tensors else None
        self._norm = tensors[NORM].to(device)

    def project(self, captured: Mapping[int, Tensor]) -> Tensor:
        """Features of rows of a forward.

        `captured[layer]`: (n, hidden), the output of that decoder layer.
        Returns bfloat16 (n, feature_size). A row's features do not depend on the other rows.
        """
        states = [captured[layer] for layer in self.info.layer_ids]
        eps = self.info.norm_eps
        inputs = self._kernels.tap_inputs(states, eps if self.info.normalize_inputs else None)
        return self._kernels.tap_outputs(self._project(inputs), self._bias, self._norm, eps)


def _check_tensors(info: TapInfo, tensors: Mapping[str, Tensor]) -> None:
    shapes = tensor_shapes(info)
    missing = {PROJECTION, NORM} - tensors.keys()
    unknown = tensors.keys() - shapes.keys()
    if missing or unknown:
        raise InvalidRequest(f"tap tensors: missing {sorted(missing)}, unknown {sorted(unknown)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32:
            raise InvalidRequest(f"tap tensor {name}: {tensor.dtype} {tuple(tensor.shape)}, not float32 {shapes[name]}")
        if not torch.isfinite(tensor).all():
            raise InvalidRequest(f"tap tensor {name}: not all of its values are finite")
    if tap_digest(info, tensors) != info.tap_id:
        raise InvalidRequest(f"tap_id {info.tap_id[:16]!r} is not the sha256 of this description and these tensors")
