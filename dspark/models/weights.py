"""Where a model's tensors come from: safetensors files of a Hugging Face directory, checked by name and shape.

A `TensorSource` gives tensors under their Hugging Face names; `dspark.models.gguf` offers the same over a GGUF file.
Nothing here unpickles anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dspark.errors import ModelFileError
from dspark.files import whole
from dspark.models.config import read_json
from dspark.models.mapped import let_go

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; `ConfigError` where the disk refuses."""
    with whole(path) as partial:
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:
            raise OSError(str(error)) from error
        partial.chmod(0o644)  # the library makes it private


class TensorSource(Protocol):
    """Tensors by Hugging Face name."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous copy on the CPU; ModelFileError where the tensor is missing or of another shape."""

    def lookup(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `get`, for a tensor of which single rows are read: bfloat16 may stay so where float32 is asked for."""


class SafetensorsSource:
    """The tensors of one safetensors file or of the shards that an index names; a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._files: dict[str, tuple[Path, Any]] = {}

    def __enter__(self) -> Self:
        try:
            for path, names in _files_of(self._directory).items():
                self._open(path, names)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tensors that are still mapped stay usable; their pages are loaded again as they are read."""
        paths = {path for path, _ in self._files.values()}
        self._files.clear()
        self._stack.close()
        let_go(paths)

    def _open(self, path: Path, names: list[str] | None) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError as error:
            raise ModelFileError(f"{path}: no such file") from error
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{path}: not a readable safetensors file: {error}") from error
        present = set(file.keys())
        for name in present if names is None else names:
            if name not in present:
                raise ModelFileError(f"{path}: tensor {name} is missing, though {INDEX_FILE} names this file for it")
            self._files[name] = (path, file)

    def _stored_name(self, name: str) -> str | None:
        return next((stored for stored in _aliases(name) if stored in self._files), None)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def names(self) -> list[str]:
        """Every stored tensor's name, sorted."""
        return sorted(self._files)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor as `dtype`, contiguous, on the CPU.

        Where the file has that dtype already, the tensor stays mapped from it: the system loads the parts that are
        used, shares them between processes and may drop them again.
        """
        return self._read(self._stored(name), shape).to(dtype).contiguous()

    def lookup(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `get`, but a bfloat16 tensor stays mapped from the file where float32 is asked for."""
        return for_lookup(self._read(self._stored(name), shape), dtype)

    def _stored(self, name: str) -> str:
        stored = self._stored_name(name)
        if stored is None:
            raise ModelFileError(f"{self._directory}: tensor {name} is missing")
        return stored

    def _read(self, stored: str, shape: tuple[int, ...]) -> torch.Tensor:
        path, file = self._files[stored]
        try:
            tensor: torch.Tensor = file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{path}: tensor {stored} is not readable: {error}") from error
        check_tensor(tensor.shape, shape, f"{path}: tensor {stored}")
        if not tensor.is_floating_point():
            raise ModelFileError(f"{path}: tensor {stored} holds {tensor.dtype}, not floating-point numbers")
        return tensor


def for_lookup(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of which single rows are read, as `dtype` or, where that is float32, as the bfloat16 it is."""
    if tensor.dtype == torch.bfloat16 and dtype == torch.float32:
        return tensor
    return tensor.to(dtype).contiguous()


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a Hugging Face directory's weights, sorted."""
    return sorted(_files_of(directory))


def _aliases(name: str) -> tuple[str, ...]:
    """Names under which checkpoints store a tensor: text models, and the text part of image-and-text ones."""
    inner = name.removeprefix("model.")
    return name, f"language_model.{name}", f"model.language_model.{inner}"


def check_tensor(found: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    """ModelFileError where a tensor's shape is not the config's."""
    if tuple(found) != tuple(expected):
        raise ModelFileError(f"{what} has shape {tuple(found)}; the config says {tuple(expected)}")


def _files_of(directory: Path) -> dict[Path, list[str] | None]:
    """Weight files and the tensors to take from each (None: all of them)."""
    index = directory / INDEX_FILE
    if not index.exists():
        return {directory / SINGLE_FILE: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelFileError(f"{index}: weight_map must map tensor names to file names")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ModelFileError(f"{index}: {file!r} is not a plain file name")
        names = files.setdefault(directory / file, [])
        assert names is not None
        names.append(name)
    return files
