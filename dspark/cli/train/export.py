"""`dspark train export`: a trained drafter in a format that others read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dspark.cli.common import Model, notes
from dspark.cluster import DEFAULT_MODEL


class FormatName(StrEnum):
    """Layouts by name."""

    deepspec = "deepspec"


def command(
    drafter: Annotated[Path, typer.Option(help="The drafter's directory.")],
    out: Annotated[Path, typer.Option(help="An empty or new directory.")],
    model: Model = DEFAULT_MODEL,
    layout: Annotated[FormatName, typer.Option("--format", help="Layout to write.")] = FormatName.deepspec,
) -> None:
    """Write a drafter in the published layout, with the target's embedding and output head, and read it back.

    Qwen3-type drafters over the whole vocabulary with a plain tap fit; what the layout cannot hold is refused.
    """
    import torch

    from dspark.models.drafters import load_drafter
    from dspark.models.pull import resolve_model
    from training.export import export_deepspec

    loaded = load_drafter(drafter, target_path=resolve_model(model), dtype=torch.bfloat16, device=torch.device("cpu"))
    export_deepspec(loaded, out)
    notes.print(f"{out}: {loaded.config.name} in the {layout.value} layout, read back and equal")
