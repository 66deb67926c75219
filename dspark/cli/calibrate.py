"""`dspark calibrate`: makes a drafter's confidences probabilities, and shows how well they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dspark.cli import common
from dspark.cli.offline import open_drafter, open_target, open_tokenizer
from dspark.cli.train.data import TemplateName
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import ConfigError
from dspark.files import write_json
from dspark.models.drafters.calibration import SETTINGS, Calibration, write_calibrations

if TYPE_CHECKING:
    from dspark.tokenizer import Tokenizer
    from training.gathering import Answering
    from training.reliability import Report
    from training.rounds import Rounds

app = typer.Typer(add_completion=False)

_CHECK_SEED = 1 << 40  # answers that are checked on come from seeds of their own


@dataclass(frozen=True, slots=True)
class _Outcome:
    calibration: Calibration
    report: Report
    fitted: int
    checked: Rounds


@app.command("calibrate")
def command(
    drafter: Annotated[Path, typer.Option(help="The drafter's directory; its config.json gets the calibration.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help='Fit on answers to these: a {"turns": ["…"]} a line. May be repeated.')
    ] = None,
    check: Annotated[
        list[Path] | None,
        typer.Option(help="Report on answers to these; without any, on every second prompt, left out of the fit."),
    ] = None,
    model: common.Model = DEFAULT_MODEL,
    template: Annotated[TemplateName, typer.Option(help="Put file prompts between `Question:` and `Answer:`.")] = (
        TemplateName.qa
    ),
    setting: Annotated[str, typer.Option(help="Which settings, with commas between.")] = ",".join(SETTINGS),
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 96,
    max_prompt_tokens: Annotated[int, typer.Option(min=4, help="Longer prompts are left out, code is cut.")] = 256,
    repeat: Annotated[int, typer.Option(min=1, help="Answers a prompt, except at temperature 0.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the settings that are not greedy.")] = 1.0,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first N of --prompts.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N of --prompts, behind --skip.")] = None,
    check_limit: Annotated[int | None, typer.Option(min=1, help="Only the first N of --check.")] = None,
    code: Annotated[int, typer.Option(min=0, help="Also fit on N prompts from Python's own modules.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the answers.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write a reliability diagram a setting to this directory.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report only; leave the checkpoint as it is.")] = False,
) -> None:
    """Fit curves that make a drafter's confidences probabilities, by setting, and write them into its config.json.

    The target answers the prompts; the rounds that the drafter would get along the answers are played without a
    cluster. ECE and AUC are of prefix survival: the probability that all drafts up to a position are accepted.
    """
    from training.gathering import Answering

    settings = _settings(setting)
    _check_drafter(drafter)
    _check_places(json_file, plots)
    texts = _Texts.read(prompts or [], check or [], template.value, skip, limit, check_limit)
    how = Answering(max_new_tokens, repeat, temperature, seed, batch)
    outcomes = _calibrated(drafter, model, device, texts, code, max_prompt_tokens, settings, how)
    for outcome in outcomes:
        common.results.print(_table(outcome))
    if plots is not None:
        _draw(plots, outcomes)
    if json_file is not None:
        _write(json_file, drafter, outcomes, written=not dry_run)
    if not dry_run:
        write_calibrations(drafter / "config.json", [outcome.calibration for outcome in outcomes])
        common.notes.print(f"{drafter / 'config.json'}: calibrated for {', '.join(settings)}")


# ---------------------------------------------------------------- what is asked for


def _settings(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SETTINGS:
            raise typer.BadParameter(f"setting {name!r} is none of {', '.join(SETTINGS)}", param_hint="--setting")
    return list(dict.fromkeys(names))


def _check_drafter(directory: Path) -> None:
    """`ConfigError` where there is nothing to calibrate, before anything heavy is loaded."""
    from dspark.models.config import read_json
    from dspark.models.drafters.config import parse_drafter_config

    path = directory / "config.json"
    config = parse_drafter_config(read_json(path), source=str(path))
    if not config.confidence_head:
        raise ConfigError(f"{directory}: a {config.architecture} drafter without a confidence head has no confidences")


def _check_places(json_file: Path | None, plots: Path | None) -> None:
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no directory {json_file.absolute().parent}")
    if plots is not None and find_spec("matplotlib") is None:
        raise ConfigError("--plots needs matplotlib: pip install '.[train]'")


@dataclass(frozen=True, slots=True)
class _Texts:
    """Prompts from files, in the model's template: those to fit on and those to check on."""

    fit: list[str]
    check: list[str]

    @staticmethod
    def read(
        prompts: Sequence[Path],
        check: Sequence[Path],
        template: Any,
        skip: int,
        limit: int | None,
        check_limit: int | None,
    ) -> _Texts:
        from training.prompts import read_hashes, read_turns, refuse_evaluation, templated

        fit: list[str] = []
        for path in prompts:
            turns = read_turns(path)
            refuse_evaluation(path, turns, read_hashes())
            fit += turns
        fit = list(dict.fromkeys(fit))[skip:][:limit]
        checked = list(dict.fromkeys(turn for path in check for turn in read_turns(path)))[:check_limit]
        if shared := set(fit) & set(checked):
            raise ConfigError(f"{len(shared)} prompts of --check are among --prompts: they would say nothing")
        return _Texts([templated(turn, template) for turn in fit], [templated(turn, template) for turn in checked])

    def prompts(
        self, tokenizer: Tokenizer, code: int, longest: int, seed: int
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Token ids to fit on and to check on; without texts to check on, every second prompt is held out."""
        from training.prompts import Mix, mixed

        fit = _encoded(tokenizer, self.fit, longest)
        if code:
            fit += [one.token_ids for one in mixed(tokenizer, [], Mix(code, 1.0, 0.0, (1.0,), longest, seed))]
        check = _encoded(tokenizer, self.check, longest)
        if not self.check:
            fit, check = fit[0::2], fit[1::2]
        if not fit or not check:
            raise ConfigError("too few prompts: some to fit on and some to check on are needed (--prompts, --code)")
        return fit, check


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> list[tuple[int, ...]]:
    encoded = [tuple(tokenizer.encode(text)) for text in texts]
    return [ids for ids in encoded if len(ids) <= longest]


# ---------------------------------------------------------------- the work


def _calibrated(
    drafter: Path,
    model: str,
    device: str,
    texts: _Texts,
    code: int,
    longest: int,
    settings: Sequence[str],
    how: Answering,
) -> list[_Outcome]:
    target, path = open_target(model, device=device)
    from dspark.models.drafters import Drafter
    from training.calibration import calibrate
    from training.gathering import gather
    from training.reliability import Report

    loaded = open_drafter(str(drafter), path, target)
    if not isinstance(loaded, Drafter):
        raise ConfigError(f"{drafter} has no confidences to calibrate")
    fit, check = texts.prompts(open_tokenizer(path, target), code, longest, how.seed)
    checking = replace(how, seed=how.seed + _CHECK_SEED)
    answers = how.repeat * (settings != ["greedy"]) + ("greedy" in settings)
    with _bar((len(fit) + len(check)) * answers) as passed:
        fitted = gather(target, loaded, fit, settings, how, passed)
        checked = gather(target, loaded, check, settings, checking, passed)
    outcomes = []
    for setting in settings:
        calibration = calibrate(fitted[setting], setting)
        report = Report.of(checked[setting], calibration)
        outcomes.append(_Outcome(calibration, report, len(fitted[setting]), checked[setting]))
    return outcomes


@contextmanager
def _bar(answers: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("playing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=common.notes) as progress:
        task = progress.add_task("", total=answers)
        yield lambda count: progress.advance(task, count)


# ---------------------------------------------------------------- what comes out


def _table(outcome: _Outcome) -> Table:
    report = outcome.report
    title = f"{report.setting}: fitted on {outcome.fitted} rounds, checked on {report.rounds} of {report.texts} answers"
    columns = (
        "position",
        "rounds",
        "acceptance",
        "survived",
        "ECE before",
        "after",
        "by chance",
        "AUC before",
        "after",
    )
    table = Table(*columns, title=title)
    for one in report.positions:
        table.add_row(
            str(one.position),
            str(one.rounds),
            *map(_shown, (one.conditional, one.survived)),
            *map(_percent, (one.ece_before, one.ece_after, one.chance)),
            *map(_shown, (one.auc_before, one.auc_after)),
        )
    means = [_percent(report.mean_ece(after=after)) for after in (False, True)]
    worst = [_percent(report.worst_ece(after=after)) for after in (False, True)]
    table.add_section()
    table.add_row("mean", "", "", "", *means)
    table.add_row("worst", "", "", "", *worst)
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2%}"  # noqa: PLR0124 - NaN


def _draw(directory: Path, outcomes: Sequence[_Outcome]) -> None:
    from training.diagrams import draw_reliability

    try:
        directory.mkdir(parents=True, exist_ok=True)
        for outcome in outcomes:
            path = directory / f"reliability-{outcome.calibration.setting}.png"
            draw_reliability(path, outcome.checked, outcome.calibration)
    except OSError as error:
        raise ConfigError(f"--plots {directory}: {error.strerror or error}") from error


def _write(path: Path, drafter: Path, outcomes: Sequence[_Outcome], *, written: bool) -> None:
    figures = [
        outcome.report.to_json() | {"fitted_rounds": outcome.fitted, "calibration": asdict(outcome.calibration)}
        for outcome in outcomes
    ]
    write_json(path, {"drafter": str(drafter), "written": written, "settings": figures})
