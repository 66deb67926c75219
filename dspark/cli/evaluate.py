"""`dspark evaluate`: acceptance, speed and exactness over a file of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dspark.cli import common
from dspark.cli.offline import check_same_model, compare_rounds, open_drafter, open_target
from dspark.client import Client
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import ConfigError
from dspark.evaluation import Evaluation, Settings, evaluate, read_prompts
from dspark.events import ServerInfo
from dspark.files import write_json
from dspark.messages import Mode, ModelInfo

app = typer.Typer(add_completion=False)


class TemplateName(StrEnum):
    """How a prompt is wrapped."""

    qa = "qa"
    none = "none"


class CompareWith(StrEnum):
    """What outputs are compared with."""

    reference = "reference"
    offline = "offline"


AGREEMENT = 0.99
"""Least share of rounds that agree with offline ones."""


@app.command("evaluate")
def command(
    prompts: Annotated[Path, typer.Option(help='JSON lines {"turns": ["…"]}; the first turn is the prompt.')],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens a prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Prompt i is sampled with seed + i.")] = 0,
    mode: Annotated[common.ModeName, typer.Option(help="Sampling mode.")] = common.ModeName.coupled,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    template: Annotated[TemplateName, typer.Option(help="qa: `Question: …\\nAnswer:`.")] = TemplateName.none,
    compare: Annotated[
        CompareWith | None,
        typer.Option(
            help="reference: tokens with those of plain decoding in a fresh process. offline: the accepted length of "
            "each round with the one that `dspark train report` would count."
        ),
    ] = None,
    no_speculation: Annotated[bool, typer.Option("--no-speculation", help="Decode without the drafter.")] = False,
    router: common.Router = None,
    model: common.Model = DEFAULT_MODEL,
    drafter: common.Drafter = "default",
    draft: common.Draft = 1,
    verify: common.Verify = 1,
    together: common.Together = None,
    policy: common.PolicyName = None,
    verify_length: common.VerifyLength = None,
    dtype: common.Dtype = None,
    log_dir: common.LogDir = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as JSON.")] = None,
) -> None:
    """Run a file of prompts through a cluster and report acceptance, speed and exactness.

    The reference of `--compare` is the same engine in a fresh process: one request at a time, one token a step, no
    prefix cache, no drafter. `--compare offline` fails where less than 99 % of the rounds agree. With `--router` both
    need the model that is served there, as `--model`, and `offline` its drafter, as `--drafter`, and draft workers with
    `--no-lookup`: what others copy from the text is no drafter's round.
    """
    if compare is CompareWith.offline:
        policy = _whole_blocks(policy)
    cluster = common.ClusterSettings(
        router, model, drafter, draft, verify, policy, verify_length, dtype, log_dir, together=together
    )
    if compare is CompareWith.offline:  # whose rounds are the drafter's own
        cluster = replace(cluster, draft_args=("--no-lookup",))
    settings = Settings(max_tokens, temperature, seed, Mode(mode.value), not no_speculation, concurrency, policy)
    if compare is not None and temperature > 0 and settings.mode is not Mode.COUPLED:
        raise typer.BadParameter("rejection mode draws anew with every run: compare at --temperature 0 or coupled")
    if compare is CompareWith.offline and no_speculation:
        raise typer.BadParameter("--compare offline compares drafts: leave --no-speculation out")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no directory {json_file.absolute().parent}")
    texts = read_prompts(prompts, limit=limit, template=template.value)
    report = common.run(_evaluate(cluster, texts, settings, compare))
    common.results.print(_table(report))
    if json_file is not None:
        write_json(json_file, report)
    if compare is CompareWith.offline and report["offline"]["share"] < AGREEMENT:
        raise typer.Exit(1)


def _whole_blocks(policy: str | None) -> str:
    """What offline rounds verify: blocks of fixed length, whole ones unless told otherwise."""
    if policy is not None and not policy.startswith("fixed:"):
        raise typer.BadParameter("--compare offline knows fixed verify lengths only: leave --policy out, or fixed:N")
    return policy or "fixed:64"


async def _evaluate(
    cluster: common.ClusterSettings, prompts: Sequence[str], settings: Settings, compare: CompareWith | None
) -> dict[str, Any]:
    async with common.open_client(cluster) as client:
        with _progress("evaluating", len(prompts)) as progress:
            result = await evaluate(client, prompts, settings, progress=progress)
        info = await client.describe()
        ids = await _tokenized(client, prompts) if compare is CompareWith.offline else []
    report = _report(result, settings, info)
    if compare is CompareWith.reference:
        report |= _compared(result, await _reference(cluster, prompts, settings, info), prompts)
    if compare is CompareWith.offline:
        report["offline"] = _offline(cluster, ids, settings, info, result)
    return report


async def _tokenized(client: Client, prompts: Sequence[str]) -> list[list[int]]:
    return [[token.id for token in await client.tokenize(prompt)] for prompt in prompts]


def _offline(
    cluster: common.ClusterSettings,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    served: ServerInfo,
    result: Evaluation,
) -> dict[str, Any]:
    """Once the cluster has gone, so that neither slows the other."""
    target, path = open_target(cluster.model, dtype=cluster.dtype)
    check_same_model(served.model, target.info)  # a worker's numerics name more than the loaded model knows
    return compare_rounds(result, prompts, settings, served, target, open_drafter(cluster.drafter, path, target))


async def _reference(
    cluster: common.ClusterSettings, prompts: Sequence[str], settings: Settings, served: ServerInfo
) -> Evaluation:
    """Started after the cluster under test has gone, so that neither slows the other."""
    plain = replace(
        cluster,
        router=None,
        drafter="none",
        draft=0,
        verify=1,
        policy="none",
        verify_length=None,
        verify_args=("--no-prefix-cache",),
    )
    alone = replace(settings, speculation=False, concurrency=1, policy=None)
    async with common.open_client(plain) as client:
        _check_same_model(served.model, (await client.describe()).model)
        with _progress("reference", len(prompts)) as progress:
            return await evaluate(client, prompts, alone, progress=progress)


def _check_same_model(served: ModelInfo, compared: ModelInfo) -> None:
    if not check_same_model(served, compared):
        common.notes.print(
            f"The cluster computed with numerics {served.numerics_fingerprint}, what it is compared with uses "
            f"{compared.numerics_fingerprint}: near ties may come out differently.",
            style="yellow",
        )


@contextmanager
def _progress(what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=common.notes, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda _: bar.advance(task)


def _report(result: Evaluation, settings: Settings, info: ServerInfo) -> dict[str, Any]:
    return {
        **result.figures(),
        "prompts": len(result.completions),
        "compared": 0,
        "equal": 0,
        "seed": settings.seed,
        "mode": settings.mode.value,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "concurrency": settings.concurrency,
        "speculation": settings.speculation,
        "policy": settings.policy or info.policy,
        "model": info.model.name,
        "model_fingerprint": info.model.model_fingerprint,
        "numerics_fingerprint": info.model.numerics_fingerprint,
        "drafter": result.counts.drafter or info.drafter,
    }


def _compared(result: Evaluation, reference: Evaluation, prompts: Sequence[str]) -> dict[str, Any]:
    equal = result.equal_to(reference)
    different = [
        {
            "prompt": prompts[index],
            "token_ids": list(result.completions[index].token_ids),
            "reference_token_ids": list(reference.completions[index].token_ids),
        }
        for index, same in enumerate(equal)
        if not same
    ]
    return {
        "compared": len(equal),
        "equal": sum(equal),
        "different": different,
        "reference_tokens_per_second_per_stream": reference.tokens_per_second_per_stream,
    }


def _table(report: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False, title=f"{report['prompts']} prompts, {report['model']}")
    rows = {
        "drafter": report["drafter"] or "none: decoded plainly",
        "accepted length τ": f"{report['tau']:.3f}",
        "conditional acceptance": " ".join(f"{share:.3f}" for share in report["conditional_acceptance"]) or "-",
        "verify length": f"{report['verify_length']:.2f}",
        "drafted / verified": f"{report['drafted']} / {report['verified']}",
        "accepted / rejected": f"{report['accepted']} / {report['rejected']}",
        "rounds (without a proposal)": f"{report['rounds']} ({report['missed_rounds']})",
        "tokens": str(report["tokens"]),
        "tokens/s": f"{report['tokens_per_second']:.1f}",
        "tokens/s a stream": f"{report['tokens_per_second_per_stream']:.1f}",
    }
    if report["compared"]:
        rows["equal to the reference"] = f"{report['equal']} of {report['compared']}"
    if "offline" in report:
        rows |= _agreement(report["offline"])
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _agreement(found: dict[str, Any]) -> dict[str, str]:
    rows = {
        "rounds as offline": f"{found['agreed']} of {found['rounds'] - found['missed']} ({100 * found['share']:.2f} %)",
        "left out: without a proposal": str(found["missed"]),
    }
    if found["untold_streams"]:
        rows["left out: streams whose rounds arrived joined"] = str(found["untold_streams"])
    return rows
