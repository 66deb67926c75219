"""Fingerprints that say whether two workers serve the same model, and would compute the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dspark.errors import ModelFileError
from dspark.kernels import Kernels
from dspark.models.config import read_config
from dspark.models.weights import weight_files

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
        **settings,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_LENGTH]


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
