"""`dspark generate`: one completion, streamed to the terminal, and what it measured."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from dspark.cli import common
from dspark.client import Client
from dspark.cluster import DEFAULT_MODEL
from dspark.events import Completion
from dspark.params import GenerateParams

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; `-` reads it from stdin.")],
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
    max_tokens: Annotated[int | None, typer.Option(help="At most so many new tokens (default 256).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely tokens up to this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text (coupled mode).")] = None,
    mode: Annotated[common.ModeName | None, typer.Option(help="Sampling mode; default coupled.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this string; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Log-probabilities of so many tokens (with --json).")] = None,
    max_verify_length: Annotated[int | None, typer.Option(help="Verify at most so many drafts a round.")] = None,
    no_speculation: Annotated[bool, typer.Option("--no-speculation", help="Decode without the drafter.")] = False,
    compare_plain: Annotated[
        bool, typer.Option("--compare-plain", help="Run it again without speculation and show both.")
    ] = False,
    as_json: common.AsJson = False,
) -> None:
    """Continue a prompt with the model of a running router, or of a cluster that is started for this."""
    settings = common.ClusterSettings(
        router, model, drafter, draft, verify, policy, verify_length, dtype, log_dir, together=together
    )
    params: GenerateParams = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "mode": None if mode is None else mode.value,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "logprobs": logprobs,
        "max_verify_length": max_verify_length,
        "policy": policy,
        "speculation": not no_speculation,
    }
    common.run(show(settings, common.read_text(prompt), params, compare_plain=compare_plain, as_json=as_json))


async def show(
    settings: common.ClusterSettings, prompt: str, params: GenerateParams, *, compare_plain: bool, as_json: bool
) -> tuple[Completion, Completion | None]:
    """Streams the completion to stdout and its figures to stderr; with `as_json` prints both as JSON at the end."""
    async with common.open_client(settings) as client:
        if compare_plain:
            await _warm_up(client)
        first = await _stream(client, prompt, params, quiet=as_json)
        plain = None
        if compare_plain:
            with common.notes.status("The same without speculation …"):
                again: GenerateParams = {**params, "seed": first.seed, "speculation": False, "whole": False}
                plain = await client.complete(prompt, **again)
    if as_json:
        typer.echo(json.dumps(_facts(first, plain)))
    elif plain is None:
        common.notes.print(summary(first), style="dim", soft_wrap=True)
    else:
        common.notes.print(comparison(first, plain))
    return first, plain


async def _warm_up(client: Client) -> None:
    """Both ways once: the first steps of a fresh worker lay out weights, which neither figure should pay for."""
    for speculation in (True, False):
        await client.complete(
            "Once upon a time", max_tokens=16, temperature=0, ignore_eos=True, speculation=speculation
        )


async def _stream(client: Client, prompt: str, params: GenerateParams, *, quiet: bool) -> Completion:
    async with client.generate(prompt, **params) as stream:
        if not quiet:
            if sys.stdout.isatty():
                common.notes.print(prompt, style="bold", end="", markup=False)
            async for piece in stream.text():
                sys.stdout.write(piece)
                sys.stdout.flush()
            typer.echo()
        return await stream.completion()


def summary(completion: Completion) -> str:
    """One line of figures."""
    counts = completion.speculation
    tokens = len(completion.token_ids)
    parts = [
        f"{tokens} token{'' if tokens == 1 else 's'} ({completion.finish_reason})",
        f"{completion.tokens_per_second:.1f} tokens/s",
        f"first after {completion.timings.first_token_seconds * 1000:.0f} ms",
    ]
    if counts.drafted:
        parts += [
            f"accepted length τ {counts.tau:.2f}",
            f"verify length {counts.verify_length:.2f}",
            f"{counts.accepted} of {counts.verified} verified drafts accepted",
        ]
        if counts.alternatives:
            parts.append(f"{counts.turned} of them by {counts.alternatives} alternatives")
    else:
        parts.append("decoded plainly" if counts.enabled else "without speculation")
    if counts.missed_rounds:
        parts.append(f"{counts.missed_rounds} of {counts.rounds} rounds without a proposal")
    return " · ".join([*parts, f"seed {completion.seed}"])


def comparison(speculative: Completion, plain: Completion) -> Table:
    """Both runs side by side."""
    table = Table("", "with speculation", "without", title="The same prompt and seed")
    rows: list[tuple[str, str]] = [
        ("tokens", "{tokens}"),
        ("tokens/s", "{rate:.1f}"),
        ("first token, ms", "{first:.0f}"),
        ("accepted length τ", "{tau:.2f}"),
        ("verify length", "{length:.2f}"),
        ("drafts accepted / verified", "{accepted} / {verified}"),
    ]
    for name, form in rows:
        table.add_row(name, *(form.format(**_figures(run)) for run in (speculative, plain)))
    same = speculative.token_ids == plain.token_ids
    table.caption = (
        f"Token ids: {'the same' if same else 'different'}. Drafter: {speculative.speculation.drafter or 'none'}."
    )
    return table


def _figures(completion: Completion) -> dict[str, Any]:
    counts = completion.speculation
    return {
        "tokens": len(completion.token_ids),
        "rate": completion.tokens_per_second,
        "first": completion.timings.first_token_seconds * 1000,
        "tau": counts.tau or 1.0,
        "length": counts.verify_length,
        "accepted": counts.accepted,
        "verified": counts.verified,
    }


def _facts(completion: Completion, plain: Completion | None) -> dict[str, Any]:
    facts = completion.to_dict()
    if plain is not None:
        facts["plain"] = plain.to_dict()
        facts["same_tokens"] = plain.token_ids == completion.token_ids
    return facts
