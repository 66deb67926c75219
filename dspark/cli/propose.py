"""`dspark propose`: drafts one block behind each of some prompts, to check a drafter's checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark import program
from dspark.cli.common import AsJson
from dspark.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from services.draft.probe import Probe

app = typer.Typer(add_completion=False)


class DtypeName(StrEnum):
    """Data types by name."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command("propose")
def command(
    target: Annotated[
        str, typer.Option(help="The target: a name that `dspark models` knows, a directory, a GGUF file.")
    ],
    drafter: Annotated[Path, typer.Option(help="The drafter's directory.")],
    ids: Annotated[Path, typer.Option(help="JSON file: a list of prompts, each a list of token ids.")],
    dtype: Annotated[DtypeName, typer.Option(help="What both models compute in.")] = DtypeName.float32,
    as_json: AsJson = False,
) -> None:
    """Draft one block behind each prompt at temperature 0, the target's greedy next token being its anchor.

    Printed for each: `anchor`, `tokens`, `confidence_logits` (before the sigmoid) and `top1_logits` (base + bias logits
    of the tokens). No cluster is started.
    """
    prompts = _read_prompts(ids)
    probes = _probe(target, drafter, prompts, dtype.value)
    if as_json:
        typer.echo(json.dumps([asdict(probe) for probe in probes]))
        return
    for index, (prompt, probe) in enumerate(zip(prompts, probes, strict=True)):
        typer.echo(f"prompt {index} ({len(prompt)} tokens)")
        for name, value in asdict(probe).items():
            typer.echo(f"  {name:<18}{_shown(value)}")


def _probe(target: str, drafter: Path, prompts: list[list[int]], dtype: str) -> list[Probe]:
    program.wait_briefly()
    import torch

    from dspark.devices import pick_numerics
    from dspark.models.drafters import load_drafter
    from dspark.models.pull import resolve_model
    from dspark.models.target import load_target
    from services.draft.probe import probe

    path, device = resolve_model(target), torch.device("cpu")
    numerics = pick_numerics("auto", dtype, device)
    model = load_target(path, dtype=numerics.dtype, device=device, kernels=numerics.kernels)
    loaded = load_drafter(drafter, target_path=path, dtype=numerics.dtype, device=device)
    return list(probe(model, loaded, prompts, path=drafter))


def _read_prompts(path: Path) -> list[list[int]]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, list) for prompt in prompts):
        raise InvalidRequest(f"{path}: expected a list of lists of token ids")
    for index, prompt in enumerate(prompts):
        for token_id in prompt:
            if type(token_id) is not int:
                raise InvalidRequest(f"{path}: prompt {index} holds {json.dumps(token_id)}, which is no token id")
    return prompts


def _shown(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{v:.6f}" if isinstance(v, float) else str(v) for v in values)
