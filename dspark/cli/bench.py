"""`dspark bench`: how policies of speculation compare as a cluster fills up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from dspark.benchmarking.plan import Cell, Plan, fixed_length, parse_concurrencies, parse_policies
from dspark.benchmarking.plots import check_plots, draw
from dspark.benchmarking.report import baseline_of, machine, report, served, write_json
from dspark.benchmarking.session import Listener, Session
from dspark.benchmarking.summary import Row, matched, same_outputs, summarise
from dspark.cli import common
from dspark.cli.evaluate import TemplateName
from dspark.client import Client
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import ConfigError
from dspark.evaluation import read_prompts
from dspark.events import ServerInfo
from dspark.messages import Mode

app = typer.Typer(add_completion=False)

T = TypeVar("T")


@app.command("bench")
def command(
    prompts: Annotated[Path, typer.Option(help='JSON lines {"turns": ["…"]}; the first turn is the prompt.')],
    concurrency: Annotated[str, typer.Option(help="Users at a time, with commas between.")] = "1,2,4,8,16,32",
    policy: Annotated[
        str,
        typer.Option(help="none, fixed:N, threshold:X, adaptive, cap-accept, default (the router's); commas between."),
    ] = "none,fixed:1,fixed:7,adaptive",
    mode: Annotated[common.ModeName, typer.Option(help="Sampling mode.")] = common.ModeName.coupled,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    requests: Annotated[
        int, typer.Option(min=1, help="Requests of a policy at a concurrency, at least three times it.")
    ] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="How often all is measured; medians are reported.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens a request.")] = 128,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Always generate --max-tokens.")] = False,
    template: Annotated[TemplateName, typer.Option(help="qa: `Question: …\\nAnswer:`.")] = TemplateName.none,
    seed: Annotated[int, typer.Option(min=0, help="Of the first request; each has its own.")] = 0,
    router: common.Router = None,
    model: common.Model = DEFAULT_MODEL,
    drafter: common.Drafter = "default",
    draft: common.Draft = 1,
    verify: common.Verify = 1,
    together: common.Together = None,
    verify_length: common.VerifyLength = None,
    dtype: common.Dtype = None,
    log_dir: common.LogDir = None,
    trace: common.Trace = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all to this file, after every repeat.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw three SVG pictures into this directory.")] = None,
) -> None:
    """Measure throughput and speed of policies at several concurrencies, interleaved in one run.

    Closed loop: so many users, each asking again as soon as it is answered. Policies take turns, their order changing
    from repeat to repeat; each is compared with `none` (else the first) in the same repeat. A cluster of one's own
    serves without a prefix cache, so that no policy finds prompts that another had to compute. Ctrl-C ends the run and
    prints what there is.
    """
    plan = Plan(
        policies=_usage("--policy", parse_policies, policy),
        concurrencies=_usage("--concurrency", parse_concurrencies, concurrency),
        repeats=repeats,
        requests=requests,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        mode=Mode(mode.value),
        ignore_eos=ignore_eos,
    )
    _check_places(json_file, plots)
    session = Session(plan, read_prompts(prompts, template=template.value), touch=router is not None)
    length = verify_length if verify_length is not None else _longest(plan)
    cluster = common.ClusterSettings(
        router,
        model,
        drafter,
        draft,
        verify,
        verify_length=length,
        dtype=dtype,
        log_dir=log_dir,
        verify_args=("--no-prefix-cache",),
        trace=trace,
        together=together,
    )
    bench = _Bench(session, cluster, json_file)
    try:
        common.run(bench.run())
    finally:  # also what there is of a run that was stopped or failed
        if session.measured:
            _keep(bench, plots)


def _keep(bench: _Bench, plots: Path | None) -> None:
    """A file that cannot be written must not cost the table."""
    try:
        bench.save()
    finally:
        _show(bench.session, plots)


def _usage(option: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _check_places(json_file: Path | None, plots: Path | None) -> None:
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no directory {json_file.absolute().parent}")
    if plots is not None:
        check_plots(plots)


def _longest(plan: Plan) -> int | None:
    """What a router must allow for every `fixed:N`; None where its default does."""
    from services.router.options import Options

    longest = max((length for name in plan.policies if (length := fixed_length(name)) is not None), default=0)
    return longest if longest > Options().verify_length else None


# ---------------------------------------------------------------- the run


@dataclass(slots=True)
class _Bench:
    """A session on a cluster, and the file that it is kept in."""

    session: Session
    cluster: common.ClusterSettings
    json_file: Path | None
    facts: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> None:
        self.facts = {"machine": machine()}
        async with common.open_client(self.cluster) as client:
            self.facts["served"] = await self._served(client)
            with self._progress() as listener:
                await self.session.run(client, listener)

    async def _served(self, client: Client) -> dict[str, Any]:
        info = await client.describe()
        _warn(self.session.plan, info, own=self.cluster.router is None)
        workers = Counter(worker.role for worker in (await client.loads()).workers)
        return served(info, workers, prefix_cache=None if self.cluster.router else False)

    @contextmanager
    def _progress(self) -> Iterator[Listener]:
        plan = self.session.plan
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        # Drawn seldom: on a small machine the bar shares the cores with what is measured.
        with Progress(
            *columns, TimeRemainingColumn(), console=common.notes, transient=True, refresh_per_second=1
        ) as bar:
            total = sum(plan.size(cell.concurrency) for cell in plan.cells())
            task = bar.add_task("warming up", total=total)

            def begins(cell: Cell) -> None:
                what = f"repeat {cell.repeat + 1}/{plan.repeats}, {cell.concurrency} users, {cell.policy}"
                bar.update(task, description=what)

            yield Listener(begins, lambda: bar.advance(task), self.save)

    def save(self) -> None:
        if self.json_file is not None:
            write_json(self.json_file, report(self.session, **self.facts))


def _warn(plan: Plan, info: ServerInfo, *, own: bool) -> None:
    if own:
        common.notes.print("The verify workers keep no prefixes: each policy computes every prompt itself.")
    else:
        common.notes.print(
            "A prefix cache cannot be switched off from here: each policy's prompts are computed once before it is "
            "measured, so that all find them equally warm. Times to the first token then say little."
        )
    for name in plan.policies:
        if (fixed_length(name) or 0) > info.verify_length:
            common.notes.print(f"{name}: this router verifies at most {info.verify_length} a round.", style="yellow")
    if not info.drafter:
        common.notes.print("No drafter is there: every policy decodes plainly.", style="yellow")


# ---------------------------------------------------------------- what comes out


def _show(session: Session, plots: Path | None) -> None:
    plan, rows = session.plan, summarise(session.measured, session.plan)
    common.results.print(_table(rows, plan, complete=session.complete))
    if (against := _matched(rows, baseline_of(plan))) is not None:
        common.results.print(against)
    _show_remarks(session)
    if plots is not None:
        common.notes.print(f"Drawn: {', '.join(map(str, draw(plots, rows)))}")


def _table(rows: Sequence[Row], plan: Plan, *, complete: bool) -> Table:
    speeds = ("tok/s", f"over\n{plan.reference}", "user\np50", "\np90", "first\np50", "\np99")
    counts = ("τ", "veri-\nfied", "was-\nted", "mis-\nsed", "er-\nrors")
    columns = (Column(name, no_wrap=True) for name in ("users", "policy", *speeds, *counts))
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.title = _title(plan, complete=complete)
    for row in rows:
        figures = row.medians
        table.add_row(
            str(row.concurrency),
            row.policy,
            _number(figures["tokens_per_second"], 1),
            "1" if row.policy == plan.reference else _ratio(row),
            *(_number(figures[name], 1) for name in ("speed_p50", "speed_p90")),
            *(_milliseconds(figures[name]) for name in ("first_token_p50", "first_token_p99")),
            *(_number(figures[name], 2) for name in ("tau", "verify_length", "wasted")),
            _percent(figures["missed_share"]),
            str(row.errors),
            end_section=row.policy == plan.policies[-1],
        )
    table.caption = (
        "Medians of the repeats. Speeds in the steady window, in tokens/s: half of the requests have p50 or more, nine "
        "of ten p90 or more. First token: milliseconds. Verified, wasted: drafts a request and round."
    )
    return table


def _title(plan: Plan, *, complete: bool) -> str:
    how = f"{plan.mode.value}, temperature {plan.temperature:g}, at most {plan.max_tokens} tokens"
    return f"{plan.repeats} repeats, {how}" + ("" if complete else " (not complete)")


def _ratio(row: Row) -> str:
    ratio = row.ratios.get("tokens_per_second")
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f}"


def _matched(rows: Sequence[Row], baseline: str) -> Table | None:
    """Speed a user at equal throughput; None where no policy reaches what the baseline does."""
    policies = [name for name in dict.fromkeys(row.policy for row in rows) if name != baseline]
    points = [p for p in matched(rows, baseline) if any(p.speeds.get(name) is not None for name in policies)]
    if not points:
        return None
    table = Table(
        "users",
        "tokens/s",
        f"{baseline}: a user",
        *policies,
        title=f"Speed a user at equal throughput, over {baseline}",
    )
    for point in points:
        shares = [_number(point.relative(name), 2) for name in policies]
        base = (_number(point.tokens_per_second, 1), _number(point.speeds[baseline], 1))
        table.add_row(str(point.concurrency), *base, *shares)
    table.caption = f"Users and tokens/s are {baseline}'s; the others' speeds lie on lines between their own points."
    return table


def _show_remarks(session: Session) -> None:
    plan, figures = session.plan, [one.figures for one in session.measured]
    if plan.reproducible and len(plan.policies) > 1:
        compared, equal = same_outputs(session.measured, plan.reference)
        common.results.print(f"Same tokens as with {plan.reference}: {equal} of {compared} answers.")
    if cached := sum(one.cached_tokens for one in figures):
        common.notes.print(f"{cached} prompt tokens came from a prefix cache.", style="yellow")
    if said := next((one.error for one in figures if one.error), ""):
        common.notes.print(f"The first error: {said}", style="red", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
