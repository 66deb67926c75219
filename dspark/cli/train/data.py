"""`dspark train data`: has the target answer prompts and keeps the token ids."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.cli.common import AsJson, Model, notes
from dspark.cli.offline import open_target, open_tokenizer
from dspark.cluster import DEFAULT_MODEL

if TYPE_CHECKING:
    from training.answering import Progress as Answered


class TemplateName(StrEnum):
    """How a text becomes a prompt."""

    qa = "qa"
    none = "none"


def command(
    out: Annotated[Path, typer.Option(help="Directory of the data set; one that was begun is gone on with.")],
    prompts: Annotated[
        list[Path] | None, typer.Option(help='File with a {"turns": ["…"]} a line. May be given several times.')
    ] = None,
    model: Model = DEFAULT_MODEL,
    template: Annotated[TemplateName, typer.Option(help="Put file prompts between `Question:` and `Answer:`.")] = (
        TemplateName.qa
    ),
    suffix: Annotated[
        str, typer.Option(help="A line to put behind every text of the files, such as an instruction.")
    ] = "",
    count: Annotated[int, typer.Option(min=1, help="Prompts to answer.")] = 5120,
    first: Annotated[
        int | None, typer.Option(min=1, help="Answer only the shards of the first so many prompts for now.")
    ] = None,
    code_share: Annotated[float, typer.Option(min=0, max=1, help="Share of prompts from Python's own modules.")] = 0.3,
    bare_share: Annotated[float, typer.Option(min=0, max=1, help="Share of prompts of the BOS token alone.")] = 0.08,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, help="Drawn from for each prompt [0 0 0.7 1 1 1]; may be repeated.")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=4, help="Longer prompts are left out, code is cut.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Longest response.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of prompts and of every response.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Have the target answer prompts; write shards of token ids and a manifest. A stopped run goes on where it was."""
    from training.prompts import Mix

    temperatures = tuple(temperature or Mix(0).temperatures)
    mix = Mix(count, code_share, bare_share, temperatures, max_prompt_tokens, seed)
    settings = {
        **asdict(mix),
        "template": template.value,
        "suffix": suffix,
        "prompt_files": [path.name for path in prompts or []],
    }
    manifest = _make(model, device, prompts or [], mix, template, suffix, settings, out, max_new_tokens, batch, first)
    if as_json:
        typer.echo(json.dumps(manifest))
    else:
        notes.print(
            f"{out}: {manifest['prompts']} responses, {manifest['response_tokens']} tokens written by the target"
        )


def _make(
    model: str,
    device: str,
    files: list[Path],
    mix: Any,
    template: TemplateName,
    suffix: str,
    settings: dict[str, Any],
    out: Path,
    max_new: int,
    batch: int,
    first: int | None,
) -> dict[str, Any]:
    from training.answering import Plan, make_data_set
    from training.prompts import digest, mixed, read_hashes, read_turns, refuse_evaluation, templated

    texts, hashes = [], read_hashes()
    for path in files:
        turns = read_turns(path)
        refuse_evaluation(path, turns, hashes)
        texts += [templated(f"{turn}\n{suffix}" if suffix else turn, template.value) for turn in turns]
    target, where = open_target(model, device=device)
    chosen = mixed(open_tokenizer(where, target), texts, mix)
    settings = {**settings, "max_new_tokens": max_new, "prompts_sha256": digest(chosen)}
    plan = Plan(out, chosen, max_new, mix.max_tokens, settings, batch=batch, first=first)
    with _Bar() as bar:
        return asdict(make_data_set(plan, target, bar.show))


class _Bar:
    """Progress with tokens a second and time left."""

    def __enter__(self) -> Self:
        columns = (TextColumn("answering"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=notes)
        self._task = self._bar.add_task("", total=1, speed="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, state: Answered) -> None:
        """After every step; nothing is shown before the first."""
        self._bar.start()
        speed = f"{state.tokens_per_second:.0f} tokens/s"
        self._bar.update(self._task, total=state.prompts, completed=state.done, speed=speed)
