"""What benchmarks of a cluster have in common on the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dspark.cluster import DEFAULT_MODEL

__all__ = ["parser_of", "write_json"]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """With the options --model, --drafter, --prompts and --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default="default")
    parser.add_argument("--prompts", type=Path, help='JSON lines {"turns": ["…"]}; default: made up here')
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def write_json(report: dict[str, Any], path: Path | None) -> None:
    """The figures, where a file was named."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
