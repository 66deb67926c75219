"""A data set on disk: shards of token ids and a manifest that says which model wrote them. No hidden states.

A token takes 4 bytes; what a drafter reads of the target is computed while training (`training.states`). Shards are
written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dspark.errors import ConfigError
from dspark.files import write_json
from dspark.models.weights import write_tensors

__all__ = [
    "Manifest",
    "Response",
    "Texts",
    "read_manifest",
    "read_texts",
    "shard_path",
    "write_manifest",
    "write_shard",
]

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class Response:
    """A prompt and the target's answer in one list of ids, and the temperature of the answer."""

    token_ids: tuple[int, ...]
    prompt_length: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """Who wrote a data set, how, and how much of it. `settings` are the command's own, by name."""

    target: str
    model_fingerprint: str
    vocab_size: int
    prompts: int
    per_shard: int
    shards: int
    settings: dict[str, Any]
    response_tokens: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that must agree before a directory is gone on with."""
        return {key: value for key, value in asdict(self).items() if key != "response_tokens"}


@dataclass(frozen=True, slots=True)
class Texts:
    """All responses of a data set.

    `token_ids[i]` are int32 (n,), `prompt_lengths` and `temperatures` have one entry each.
    """

    token_ids: list[torch.Tensor]
    prompt_lengths: list[int]
    temperatures: list[float]

    def __len__(self) -> int:
        return len(self.token_ids)

    def __add__(self, other: Texts) -> Texts:
        return Texts(
            self.token_ids + other.token_ids,
            self.prompt_lengths + other.prompt_lengths,
            self.temperatures + other.temperatures,
        )

    def digest(self) -> str:
        """What tells these texts from others: a sha256 over lengths and ids."""
        found = hashlib.sha256(repr([len(ids) for ids in self.token_ids]).encode())
        for ids in self.token_ids:
            found.update(ids.numpy().tobytes())
        return found.hexdigest()

    @property
    def response_tokens(self) -> int:
        """Tokens that the target wrote."""
        return sum(map(len, self.token_ids)) - sum(self.prompt_lengths)


def shard_path(directory: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return directory / f"shard-{number:05d}.safetensors"


def write_shard(path: Path, responses: Sequence[Response]) -> None:
    """Write responses end to end; `ConfigError` where the disk refuses."""
    tensors = {
        "token_ids": torch.tensor([token for one in responses for token in one.token_ids], dtype=torch.int32),
        "lengths": torch.tensor([len(one.token_ids) for one in responses], dtype=torch.int32),
        "prompt_lengths": torch.tensor([one.prompt_length for one in responses], dtype=torch.int32),
        "temperatures": torch.tensor([one.temperature for one in responses]),
    }
    write_tensors(path, tensors)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all."""
    write_json(directory / MANIFEST_FILE, asdict(manifest))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a data set; `ConfigError` where it is none."""
    path = directory / MANIFEST_FILE
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} is no data set: it has no {MANIFEST_FILE} (`dspark train data` makes one)"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def read_texts(directory: Path) -> Texts:
    """Every response of the shards that are there; `ConfigError` where one is broken or none is there."""
    manifest = read_manifest(directory)
    texts = Texts([], [], [])
    for number in range(manifest.shards):
        path = shard_path(directory, number)
        if path.exists():
            for ids, prompt_length, temperature in _read_shard(path):
                texts.token_ids.append(ids)
                texts.prompt_lengths.append(prompt_length)
                texts.temperatures.append(temperature)
    if not len(texts):
        raise ConfigError(f"{directory} holds no finished shard")
    return texts


def _read_shard(path: Path) -> Iterator[tuple[torch.Tensor, int, float]]:
    try:
        tensors = load_file(path)
        pieces = torch.split(tensors["token_ids"], tensors["lengths"].tolist())
        yield from zip(pieces, tensors["prompt_lengths"].tolist(), tensors["temperatures"].tolist(), strict=True)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} is no shard of a data set: {error}") from error
