"""What a router needs of a model instead of its files: `tokenizer.json` and `model.json`.

`model.json` holds the chat template and the end and begin tokens beside a few facts of the model's description.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from dspark.errors import ModelFileError
from dspark.messages import ModelInfo

__all__ = ["chat_template", "tokenizer_files"]


def tokenizer_files(model: Path, info: ModelInfo) -> dict[str, bytes]:
    """Both files' bytes by name, of a model directory or of the directory that a GGUF file lies in.

    `ModelFileError` where it has no readable tokenizer.json.
    """
    directory = model if model.is_dir() else model.parent
    path = directory / "tokenizer.json"
    try:
        tokenizer = path.read_bytes()
    except OSError as error:
        hint = "" if model.is_dir() else f"; {model.name} needs one beside it"
        raise ModelFileError(f"{path}: {error.strerror or error}{hint}") from error
    facts = {
        "name": info.name,
        "architecture": info.architecture,
        "vocab_size": info.vocab_size,
        "max_context": info.max_context,
        "eos_token_ids": list(info.eos_token_ids),
        "bos_token_id": info.bos_token_id,
        "chat_template": chat_template(model),
    }
    return {"tokenizer.json": tokenizer, "model.json": json.dumps(facts).encode()}


def chat_template(model: Path) -> str | None:
    """The model's chat template: its own file, or the entry in tokenizer_config.json; None where it has none."""
    directory = model if model.is_dir() else model.parent
    own = directory / "chat_template.jinja"
    if own.is_file():
        return _text(own)
    config = directory / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        template = json.loads(_text(config)).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ModelFileError(f"{config}: not a JSON object ({error})") from error
    return _default_template(template)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: {error}") from error


def _default_template(template: object) -> str | None:
    """A configuration may hold one template or several named ones."""
    if isinstance(template, str):
        return template
    named = [entry for entry in template if isinstance(entry, Mapping)] if isinstance(template, list) else []
    for entry in named:
        if entry.get("name") == "default" and isinstance(entry.get("template"), str):
            return str(entry["template"])
    return None
