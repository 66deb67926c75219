"""`dspark train report`: what drafters gain on files of prompts, without a cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from dspark.cli.common import Model, notes, results
from dspark.cli.offline import open_drafter, open_target, open_tokenizer
from dspark.cli.train.data import TemplateName
from dspark.cluster import DEFAULT_MODEL, find_drafter
from dspark.errors import ConfigError
from dspark.evaluation import read_prompts
from dspark.files import write_json

if TYPE_CHECKING:
    from dspark.models.target import TargetModel
    from training.proposers import AnyDrafter
    from training.report import Row
    from training.timing import RoundTime


def command(
    drafter: Annotated[
        list[str],
        typer.Option(help="NAME=DIR, NAME=ngram (prompt lookup) or NAME=default. May be given several times."),
    ],
    prompts: Annotated[
        list[str], typer.Option(help='NAME=FILE with a {"turns": ["…"]} a line. May be given several times.')
    ],
    model: Model = DEFAULT_MODEL,
    template: Annotated[TemplateName, typer.Option(help="qa: `Question: …\\nAnswer:`.")] = TemplateName.qa,
    limit: Annotated[int | None, typer.Option(min=1, help="Only N prompts of each file.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first N prompts of each file.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="At most so many new tokens a prompt.")] = 96,
    settings: Annotated[str, typer.Option(help="Of rejection, coupled and greedy.")] = "rejection,coupled,greedy",
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers, but for greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Prompt i is answered with seed + i.")] = 0,
    verify_length: Annotated[int | None, typer.Option(min=0, help="Draft tokens verified a round at most.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 64,
    timing: Annotated[bool, typer.Option(help="Also time drafting and verifying.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32 [the faster one here].")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw SVG figures in this directory.")] = None,
    log: Annotated[
        list[str] | None, typer.Option(help="NAME=RUN of `dspark train run`: draw its validations, too.")
    ] = None,
) -> None:
    """Report accepted length, acceptance by position and confidence thresholds of drafters, offline.

    The target answers every prompt as it would through a cluster in coupled mode; then each drafter plays the rounds
    that it would get. greedy and coupled rounds are exactly a cluster's; rejection rounds are distributed as its are.
    Thresholds keep draft tokens while the product of their confidences is at least so much.
    """
    from training.figures import draw, read_log
    from training.report import Plan, make_rows, to_json

    logs = {name: read_log(Path(run)) for name, run in _named(log or [], "--log").items()}
    texts = _texts(prompts, template, skip, limit)
    plan = Plan(_settings(settings), max_tokens, temperature, seed, verify_length, batch)
    _check_writable(json_file)
    target, path = open_target(model, device=device, dtype=dtype)
    drafters = {name: open_drafter(where, path, target) for name, where in _drafters(drafter, path).items()}
    tokenizer = open_tokenizer(path, target)
    ids = {name: [tokenizer.encode(text) for text in own] for name, own in texts.items()}
    with notes.status("…") as status:
        rows = make_rows(target, drafters, ids, plan, status.update)
        times = _times(target, drafters) if timing else []
    _print(rows, times)
    if json_file is not None:
        figures = {"model": target.info.name, "rows": to_json(rows), "times": [_time_json(one) for one in times]}
        write_json(json_file, figures)
    if plots is not None:
        notes.print(f"drawn: {', '.join(path.name for path in draw(rows, logs, plots))}")


# ---------------------------------------------------------------- what was asked for


def _named(values: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE each."""
    named = {}
    for value in values:
        name, sign, rest = value.partition("=")
        if not (name and sign and rest):
            raise typer.BadParameter(f"{option} {value!r} is not NAME=VALUE")
        named[name] = rest
    return named


def _drafters(values: Sequence[str], model: Path) -> dict[str, str]:
    """NAME=DIR each, where NAME may hold a `=` too, as in depth=2=DIR."""
    named = {}
    for value in values:
        cuts = [at for at, sign in enumerate(value) if sign == "=" and 0 < at < len(value) - 1]
        known = next((at for at in cuts if _exists(value[at + 1 :], model)), None)
        if known is None:
            raise ConfigError(f"--drafter {value!r} is not NAME=DIR of a drafter, NAME=ngram or NAME=default")
        named[value[:known]] = value[known + 1 :]
    return named


def _exists(drafter: str, model: Path) -> bool:
    try:
        return find_drafter(drafter, model) is not None
    except ConfigError:
        return False


def _settings(value: str) -> tuple[str, ...]:
    from dspark.models.drafters.calibration import SETTINGS

    asked = tuple(part.strip() for part in value.split(",") if part.strip())
    unknown = [part for part in asked if part not in SETTINGS]
    if unknown or not asked:
        raise typer.BadParameter(f"--settings {value!r}: of {', '.join(SETTINGS)}")
    return tuple(dict.fromkeys(asked))


def _texts(files: Sequence[str], template: TemplateName, skip: int, limit: int | None) -> dict[str, list[str]]:
    found = {}
    for name, file in _named(files, "--prompts").items():
        found[name] = read_prompts(Path(file), template=template.value)[skip:][:limit]
        if not found[name]:
            raise ConfigError(f"{file} has no prompt behind the first {skip}")
    return found


def _check_writable(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: there is no directory {path.absolute().parent}")


def _times(target: TargetModel, drafters: Mapping[str, AnyDrafter]) -> list[RoundTime]:
    from training.timing import time_round

    return [time_round(name, one, target, streams=streams) for name, one in drafters.items() for streams in (1, 8)]


# ---------------------------------------------------------------- what came of it


def _print(rows: Sequence[Row], times: Sequence[RoundTime]) -> None:
    results.print(_lengths(rows))
    if any(row.sweep for row in rows):
        results.print(_sweeps([row for row in rows if row.sweep]))
    if times:
        results.print(_timings(times))


def _lengths(rows: Sequence[Row]) -> Table:
    columns = ("data", "setting", "drafter", "τ", "τ without loops", "rounds", "conditional acceptance by position")
    table = Table(*columns, title="Accepted length")
    for row in rows:
        loops = "" if row.tau_without_loops is None else _number(row.tau_without_loops)
        if loops:
            loops += f" ({row.texts - row.looping_texts} of {row.texts} texts)"
        shares = " ".join(_number(share) for share in row.conditional_acceptance)
        table.add_row(row.data, row.setting, row.drafter, _number(row.tau), loops, str(row.rounds), shares)
    return table


def _sweeps(rows: Sequence[Row]) -> Table:
    """Acceptance, verified drafts and accepted length at every threshold; three lines a row."""
    thresholds = [f"{point.threshold:.1f}" for point in rows[0].sweep]
    title = "Drafts verified while the product of confidences is at least …"
    table = Table("", "", *thresholds, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        name = f"{row.data}\n{row.setting}\n{row.drafter} ({'calibrated' if row.calibrated else 'raw'})"
        cells = [f"{_percent(p.acceptance)}\n{p.kept:.2f}\n{p.tau:.2f}" for p in row.sweep]
        table.add_row(name, "kept %\ndrafts\nτ", *cells, end_section=True)
    return table


def _timings(times: Sequence[RoundTime]) -> Table:
    columns = ("drafter", "streams", "draft ms", "its head ms", "verify ms", "head of draft", "head of round")
    table = Table(*columns, title="Time of a round")
    for one in times:
        cells = (f"{1000 * seconds:.2f}" for seconds in (one.draft, one.head, one.verify))
        shares = (f"{100 * share:.1f} %" for share in (one.head_of_draft, one.head_of_round))
        table.add_row(one.drafter, str(one.streams), *cells, *shares)
    return table


def _time_json(one: RoundTime) -> dict[str, Any]:
    return asdict(one) | {"head_of_draft": one.head_of_draft, "head_of_round": one.head_of_round}


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f}"
