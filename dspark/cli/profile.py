"""`dspark profile`: what this machine's verify and draft steps cost, as workers measure it and routers read it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dspark import program
from dspark.cli import common
from dspark.cluster import DEFAULT_MODEL, find_drafter
from dspark.costs import CostModel, Refined
from dspark.errors import ConfigError

app = typer.Typer(add_completion=False)

_STEPS = {"verify": "Verify steps, by rows", "draft": "Drafts of whole blocks, by requests"}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the command line says of both workers."""

    device: str
    dtype: str | None
    threads: int | None
    choice: Literal["auto", "measure"]
    seconds: float

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of a worker; what is not said comes from the environment, as it does for workers."""
        said = {"dtype": self.dtype, "threads": self.threads}
        known = {name: value for name, value in said.items() if value is not None}
        place = {"device": self.device, "store": "redis://none"}  # never asked
        return known | place | {"profile": self.choice, "profile_seconds": self.seconds}


@app.command("profile")
def command(
    model: common.Model = DEFAULT_MODEL,
    drafter: common.Drafter = "default",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    dtype: common.Dtype = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default as workers choose them.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure although there are kept figures.")] = False,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long each measurement may take.")] = 20.0,
    as_json: common.AsJson = False,
    plots: Annotated[Path | None, typer.Option(help="Draw the curves as SVG files in this directory.")] = None,
) -> None:
    """Show what a verify step and a draft cost here: milliseconds by tokens and context.

    Workers measure this at start and keep it; so does this command, and reads what they kept. Where the measured
    figure (in brackets) is above what schedulers go by, a larger step was faster.
    """
    _logs_aside()
    if plots is not None:
        _need_matplotlib()  # said before anything is measured
    asked = _Asked(device, dtype, threads, "measure" if measure else "auto", seconds)
    models = _models(model, drafter, asked)
    if plots is not None:
        for path in _draw(models, plots):
            common.notes.print(f"{path}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps({"profiles": [_facts(made) for made in models]}))
        return
    for made in models:
        common.results.print(_table(made))


def _models(model: str, drafter: str, asked: _Asked) -> list[CostModel]:
    program.wait_briefly()
    from dspark.models.pull import resolve_model

    path = resolve_model(model)
    found = find_drafter(drafter, path)
    with common.notes.status("Timing verify steps …"):
        models = [_verify(path, asked)]
    if found is not None:
        with common.notes.status("Timing drafts …"):
            models.append(_draft(found, path, asked))
    return models


def _verify(path: Path, asked: _Asked) -> CostModel:
    from services.verifier.settings import Settings
    from services.verifier.worker import prepare

    with program.one_thread("profile") as thread:  # as workers have one, whose team has cores of its own
        engine, _ = thread.submit(prepare, Settings(model=str(path), **asked.settings), path).result()
    return _known(engine.costs, "step")


def _draft(drafter: Path, path: Path, asked: _Asked) -> CostModel:
    from services.draft.serving import prepare
    from services.draft.settings import Settings

    with program.one_thread("profile") as thread:
        settings = Settings(drafter=drafter, target=str(path), **asked.settings)
        engine, _ = thread.submit(prepare, settings).result()
    return _known(engine.costs, "draft")


def _known(costs: Refined | None, what: str) -> CostModel:
    if costs is None:
        raise ConfigError(f"there is no room for any {what} that could be timed: more pages or positions are needed")
    return costs.model


def _logs_aside() -> None:
    """Only warnings, and those on stderr: stdout is the result's."""
    import logging

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


# ---------------------------------------------------------------- what comes out


def _facts(model: CostModel) -> dict[str, Any]:
    """The raw points, and the envelope over them: `envelope[i][j]` seconds at `contexts[i]` and `tokens[j]`."""
    raw: dict[str, Any] = json.loads(model.profile.to_json())
    return raw | {
        "tokens": model.tokens.astype(int).tolist(),
        "contexts": model.contexts.astype(int).tolist(),
        "envelope": model.envelope.tolist(),
    }


def _table(model: CostModel) -> Table:
    profile = model.profile
    made = datetime.fromtimestamp(profile.made_at, UTC)
    title = f"{_STEPS[profile.kind]}: ms (measured)"
    caption = f"{profile.fingerprint[:12]}, {made:%Y-%m-%d %H:%M} UTC"
    columns = (f"context {context:.0f}" for context in model.contexts)
    table = Table("rows" if profile.kind == "verify" else "requests", *columns, title=title, caption=caption)
    measured = {(point.tokens, point.context): point.seconds for point in profile.points}
    for place, tokens in enumerate(model.tokens):
        row = zip(model.contexts, model.envelope[:, place], strict=True)
        table.add_row(f"{tokens:.0f}", *(_cell(float(seconds), measured.get((tokens, at))) for at, seconds in row))
    return table


def _cell(seconds: float, measured: float | None) -> str:
    return f"{1e3 * seconds:.2f} ({'-' if measured is None else f'{1e3 * measured:.2f}'})"


def _need_matplotlib() -> None:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError("--plots needs matplotlib: pip install '.[train]'") from error
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dspark"})


def _draw(models: Sequence[CostModel], directory: Path) -> list[Path]:
    """One figure a kind of step: the envelope as lines, measured points as dots."""
    from matplotlib.figure import Figure

    paths = []
    for model in models:
        figure = Figure(figsize=(5.0, 3.2))
        axes = figure.subplots()
        for context, seconds in zip(model.contexts, model.envelope, strict=True):
            own = [point for point in model.profile.points if point.context == context]
            (line,) = axes.plot(model.tokens, 1e3 * seconds, label=f"context {context:.0f}")
            dots = [point.tokens for point in own], [1e3 * point.seconds for point in own]
            axes.plot(*dots, "o", markersize=3.5, color=line.get_color())
        axes.set(xscale="log", yscale="log", xlabel=_STEPS[model.profile.kind], ylabel="milliseconds")
        axes.legend(frameon=False)
        paths.append(directory / f"profile-{model.profile.kind}.svg")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(paths[-1], bbox_inches="tight", metadata={"Date": None})
        except OSError as error:
            raise ConfigError(f"--plots {directory}: {error.strerror or error}") from error
    return paths
