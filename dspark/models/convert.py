"""Turns a GGUF file into a Hugging Face directory: bf16 safetensors, config.json and tokenizer.json.

Needs transformers (the `convert` extra) for the tokenizer alone, which it rebuilds from the file's metadata.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from dspark.errors import ConfigError, ModelFileError
from dspark.models.gguf import GgufSource

Report = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is done."""


def convert_gguf(source: Path, destination: Path, *, report: Report = lambda *_: None) -> Path:
    """Convert `source` into the new directory `destination`, which appears whole or not at all."""
    if destination.exists():
        raise ConfigError(f"{destination} exists already")
    destination.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        write_converted(source, work, report=report)
        work.chmod(0o755)
        work.rename(destination)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return destination


def write_converted(source: Path, directory: Path, *, report: Report = lambda *_: None) -> None:
    """Write weights, config and tokenizer of a GGUF file into an existing directory."""
    gguf = GgufSource(source)
    tensors, names = {}, gguf.names()
    for done, name in enumerate(names):
        report("weights", done, len(names))
        tensors[name] = gguf.get(name, gguf.shape(name), torch.bfloat16)
    report("weights", len(names), len(names))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    _write_json(directory / "config.json", {**gguf.config, "dtype": "bfloat16"})
    report("tokenizer", 0, 1)
    _write_tokenizer(source, directory)
    check_beginning(gguf.first_token_id, directory / "tokenizer.json")
    report("tokenizer", 1, 1)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(source: Path, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and, where the file has one, chat_template.jinja."""
    try:
        from transformers import AutoTokenizer  # noqa: PLC0415  # an extra, needed here only
    except ImportError as error:
        raise ConfigError("converting a GGUF file needs transformers: pip install '.[convert]'") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise ModelFileError(f"{source}: its tokenizer is not readable: {error}") from error
    tokenizer.save_pretrained(directory)


def check_beginning(token_id: int | None, path: Path) -> None:
    """`ModelFileError` unless texts begin with this token, if any, as a GGUF file wants: else it was rebuilt wrongly.

    Before 5.23 transformers forgot the token and split Gemma's words otherwise than the model was trained to read them.
    """
    found = Tokenizer.from_file(str(path)).encode("").ids[:1]
    if token_id is not None and found != [token_id]:
        raise ModelFileError(
            f"{path.name}: texts begin with {found}, not with token {token_id}: this transformers does not rebuild the"
            " tokenizer rightly; pip install -U transformers"
        )
