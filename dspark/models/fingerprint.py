"""Fingerprints: whether two workers serve the same model, would compute the same bits, and take as long for it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dspark import __version__
from dspark.costs.profile import Kind, fingerprint_of
from dspark.devices import processor_name
from dspark.errors import ModelFileError
from dspark.kernels import Kernels
from dspark.models.config import read_config
from dspark.models.weights import weight_files

NUMERICS = 7
"""Goes up with every change of this code that changes bits."""

_CHUNK = 1 << 24
_LENGTH = 32


def model_fingerprint(path: Path) -> str:
    """Hex fingerprint of a model's weights and shapes: a Hugging Face directory or a GGUF file.

    Reads every byte of the weight files (about a second per GB); file names, dates and the tokenizer do not matter.
    """
    digest = hashlib.sha256()
    if path.is_file():
        files = [path]
    else:
        digest.update(repr(read_config(path)).encode())
        files = weight_files(path)
    for file in files:
        _update(digest, file)
    return digest.hexdigest()[:_LENGTH]


def numerics_fingerprint(dtype: torch.dtype, kernels: Kernels, device: torch.device, **settings: Any) -> str:
    """Hex fingerprint of what decides a row's bits beside weights and prompt; `settings` are further such choices."""
    facts: Mapping[str, Any] = {
        "dtype": str(dtype),
        "kernels": kernels.name,
        "device": _device_name(device),
        "torch": torch.__version__,
        "numerics": NUMERICS,
        **settings,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_LENGTH]


_COSTS = 12  # raised whenever steps become faster or slower: what was measured before is measured again


def cost_fingerprint(
    kind: Kind, model: str, *, dtype: torch.dtype, kernels: Kernels, device: torch.device, **settings: Any
) -> str:
    """Hex sha256 of what step times depend on: `model` (or drafter), machine, software and further `settings`.

    Number of threads and cores are those of this moment: set them before.
    """
    facts = {
        "model": model,
        "dtype": str(dtype),
        "kernels": kernels.name,
        "device": _device_name(device),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        # The process's, not this thread's, which may have a core of its own.
        "cores": len(os.sched_getaffinity(os.getpid())) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "dspark": __version__,
        "revision": _COSTS,
        **settings,
    }
    return fingerprint_of(kind, facts)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def _update(digest: Any, file: Path) -> None:
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ModelFileError(f"{file}: not readable: {error}") from error
