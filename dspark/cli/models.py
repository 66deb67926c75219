"""`dspark models`: get, list and convert target models."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dspark.models import pull as named

app = typer.Typer(help="Get, list and convert target models.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="A named model; `dspark models list` shows them.")],
    as_json: AsJson = False,
) -> None:
    """Download a named model and convert it once into the cache; nothing to do the second time."""
    started, ready = time.monotonic(), name in named.MODELS and named.is_ready(name)
    with _progress() as report:
        path = named.pull(name, report=report)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        typer.echo(json.dumps({"name": name, "path": str(path), "already_there": ready, "seconds": seconds}))
    else:
        typer.echo(f"{name}: {path}" + (" (already there)" if ready else f" ({seconds} s)"))
        typer.echo(f"Terms of use: {named.MODELS[name].terms}", err=True)


@app.command(name="list")
def list_models(as_json: AsJson = False) -> None:
    """Show the named models and where they are."""
    rows = [{"name": name, "ready": named.is_ready(name), "path": str(named.model_path(name))} for name in named.MODELS]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        state = row["path"] if row["ready"] else f"not here; run `dspark models pull {row['name']}`"
        typer.echo(f"{row['name']}  {state}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A GGUF file (gemma3 or qwen3).")],
    destination: Annotated[Path, typer.Argument(help="The directory to make.")],
    as_json: AsJson = False,
) -> None:
    """Convert a GGUF file into a directory with bf16 safetensors, config.json and tokenizer.json."""
    from dspark.models.convert import convert_gguf

    started = time.monotonic()
    with _progress() as report:
        convert_gguf(source, destination, report=report)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        typer.echo(json.dumps({"path": str(destination), "seconds": seconds}))
    else:
        typer.echo(f"{destination} ({seconds} s)")


@contextmanager
def _progress() -> Iterator[named.Report]:
    """A progress bar on stderr, one line for each thing that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:10}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as bar:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        yield report
