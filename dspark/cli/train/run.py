"""`dspark train run`: trains one drafter, or goes on with a run that was stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dspark import program
from dspark.cli.common import AsJson, Model, notes
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from training.plan import RunPlan
    from training.run import Outcome
    from training.trainer import StepReport

COMPILED_STEPS = 2000
HINT_LENGTHS = (1, 2, 3, 4, 6, 8)


class Architecture(StrEnum):
    """Drafters that can be trained."""

    dspark = "dspark"
    dflash = "dflash"
    eagle3 = "eagle3"
    mtp = "mtp"


class HeadName(StrEnum):
    """Sequential heads."""

    vanilla = "vanilla"
    gated = "gated"
    rnn = "rnn"


def command(
    data: Annotated[list[Path], typer.Option(help="Data set of `dspark train data`. May be given several times.")],
    out: Annotated[Path, typer.Option(help="Directory of the finished checkpoint.")],
    run: Annotated[
        Path, typer.Option("--run-dir", help="The run's state and logs; a run found there is gone on with.")
    ],
    model: Model = DEFAULT_MODEL,
    architecture: Annotated[Architecture, typer.Option(help="Kind of drafter.")] = Architecture.dspark,
    name: Annotated[str, typer.Option(help="The drafter's name [the directory's].")] = "",
    layers: Annotated[int, typer.Option(min=1, help="Draft layers; Eagle3 has one.")] = 2,
    block: Annotated[int, typer.Option(min=1, help="Most tokens drafted a round.")] = 7,
    head: Annotated[HeadName, typer.Option(help="Sequential head of a dspark drafter.")] = HeadName.vanilla,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the sequential head.")] = 64,
    draft_vocab: Annotated[int, typer.Option(min=0, help="Tokens that can be drafted; 0: all.")] = 8192,
    plain_tap: Annotated[
        bool,
        typer.Option("--plain-tap", help="Read hidden states as they are: can be exported in the published format."),
    ] = False,
    hints: Annotated[
        bool,
        typer.Option(help="Tell the drafter what followed the last occurrence of the text's end; dspark only."),
    ] = True,
    feature_layers: Annotated[str, typer.Option(help="Target layers read, 1,6,11,16 [four, evenly spread].")] = "",
    blocks: Annotated[int, typer.Option(min=1, help="Blocks to train on in all.")] = 300_000,
    sequences: Annotated[int, typer.Option(min=1, help="Texts a step, over all processes.")] = 4,
    anchors: Annotated[int, typer.Option(min=1, help="Blocks of each text.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a step, one by one.")] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="Its highest value.")] = 1.5e-3,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the run in which it rises.")] = 0.04,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of a step's gradient.")] = 1.0,
    decay: Annotated[float, typer.Option(min=0.01, help="Weight of block position k is exp(-(k - 1) / decay).")] = 4.0,
    lengths: Annotated[
        str, typer.Option(help="1,2,7: cut each step's blocks to one of these, and take more of them [all whole].")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the start and of every step's choice.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Where the target's states are kept [DATA/states each]; not on a card.")
    ] = None,
    cache_gb: Annotated[float, typer.Option(min=0, help="Most disk, or memory of the card, that they may take.")] = 8.0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 500,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 1000,
    warm_start: Annotated[bool, typer.Option(help="Start from the target's last layers.")] = True,
    begin_with: Annotated[
        Path | None, typer.Option(help="Run directory or checkpoint: begin with its drafter and draft vocabulary.")
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile the loss [on a CPU, for 2,000 steps and more]."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as torch takes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a drafter on a data set. `torchrun --no-python dspark train run …` shares the steps over processes."""
    program.wait_briefly()
    import torch

    from dspark.devices import pick_device
    from dspark.models.pull import resolve_model
    from training.initialise import Shape
    from training.plan import RunPlan
    from training.run import own_device
    from training.trainer import TrainSettings

    if threads:
        torch.set_num_threads(threads)
    cut = _numbers("--lengths", lengths)
    settings = TrainSettings(
        blocks, sequences, anchors, accumulate, learning_rate, warmup, clip, decay, seed=seed, lengths=cut
    )
    where = pick_device(own_device(str(pick_device(device))))
    fused = where.type == "cpu" and settings.steps >= COMPILED_STEPS if compile_ is None else compile_
    plan = RunPlan(
        target=resolve_model(model),
        data=tuple(data),
        run=run,
        out=out,
        name=name or out.name,
        settings=TrainSettings(**{**asdict(settings), "compile": fused}),
        shape=Shape(
            architecture.value,
            layers,
            block,
            _numbers("--feature-layers", feature_layers),
            draft_vocab,
            rank,
            head.value,
            plain_tap,
            HINT_LENGTHS if hints and architecture is Architecture.dspark and not plain_tap else (),
        ),
        cache=cache,
        cache_gb=cache_gb,
        save_every=save_every,
        validate_every=validate_every,
        warm_start=warm_start,
        begin_with=begin_with,
        device=str(where),
    )
    outcome = _train(plan)
    if outcome is not None:
        _print(plan, outcome, as_json=as_json)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is no list of numbers") from error


def _train(plan: RunPlan) -> Outcome | None:
    """The outcome in the first process, None in the others."""
    from training.run import joined_processes, train

    with joined_processes(plan.device) as exchange, _Bar(shown=exchange.rank == 0, steps=plan.settings.steps) as bar:
        outcome = train(plan, exchange, bar.show)
        return outcome if exchange.rank == 0 else None


def _print(plan: RunPlan, outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(outcome)))
        return
    found = outcome.validation
    rows = (
        ("checkpoint", str(plan.out)),
        ("training", f"{outcome.seconds:.0f} s, {plan.settings.steps} steps, {plan.settings.blocks} blocks"),
        ("1 - TV", " ".join(f"{value:.3f}" for value in found.acceptance)),
        ("tokens a round", f"{found.tau:.2f} at temperature 1, {found.greedy_tau:.2f} at 0 (held-out texts)"),
        ("peak memory", f"{outcome.peak_bytes / 1e9:.2f} GB"),
        ("cached states", f"{outcome.cache_bytes / 1e9:.2f} GB, at most {plan.cache_gb:g}"),
    )
    for label, value in rows:
        typer.echo(f"{label:<16}{value}")


class _Bar:
    """Progress with loss, blocks a second and time left."""

    def __init__(self, *, shown: bool, steps: int) -> None:
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=notes, disable=not shown)
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: StepReport) -> None:
        """After every step; nothing is shown before the first."""
        self._bar.start()
        self._bar.update(self._task, completed=step.step, description=f"step {step.step} loss {step.loss:.3f}")
