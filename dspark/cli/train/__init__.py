"""`dspark train`: from prompts to a drafter's checkpoint. One module a stage."""

from __future__ import annotations

import typer

from dspark.cli.train import data, export, report, run

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train drafters for a target of your own."""


app.command("data")(data.command)
app.command("run")(run.command)
app.command("report")(report.command)
app.command("export")(export.command)
