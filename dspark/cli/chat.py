"""`dspark chat`: a conversation in the terminal, with models that have a chat template."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from typing import Annotated

import typer

from dspark.cli import common
from dspark.cli.generate import summary
from dspark.client import Client
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import ConfigError
from dspark.params import GenerateParams

app = typer.Typer(add_completion=False)


@app.command()
def chat(
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
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    mode: Annotated[common.ModeName | None, typer.Option(help="Sampling mode; default coupled.")] = None,
    no_speculation: Annotated[bool, typer.Option("--no-speculation", help="Decode without the drafter.")] = False,
) -> None:
    """Talk with a chat model. An empty line or Ctrl-D ends, `/new` starts over."""
    settings = common.ClusterSettings(
        router, model, drafter, draft, verify, policy, verify_length, dtype, log_dir, together=together
    )
    params: GenerateParams = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "mode": None if mode is None else mode.value,
        "speculation": not no_speculation,
        "policy": policy,
    }
    common.run(_converse(settings, system, params))


async def _converse(settings: common.ClusterSettings, system: str | None, params: GenerateParams) -> None:
    opening = [] if system is None else [{"role": "system", "content": system}]
    async with common.open_client(settings) as client:
        served = (await client.describe()).model
        if not served.has_chat_template:
            raise ConfigError(f"model {served.name!r} has no chat template; continue texts with `dspark generate`")
        messages = list(opening)
        while (said := await _ask()) is not None:
            if said == "/new":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": await _answer(client, messages, params)})


async def _ask() -> str | None:
    """What the user types next; None when they are done.

    Read in a thread, as the answers' stream must not stop, and in one that nobody waits for: Ctrl-C ends at once.
    """
    common.notes.print("> ", style="bold green", end="")
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def settle(text: str) -> None:
        if not line.done():
            line.set_result(text)

    def read() -> None:
        text = sys.stdin.readline()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, text)

    threading.Thread(target=read, daemon=True).start()
    return (await line).strip() or None


async def _answer(client: Client, messages: list[dict[str, str]], params: GenerateParams) -> str:
    async with client.generate(messages, **params) as stream:
        async for piece in stream.text():
            sys.stdout.write(piece)
            sys.stdout.flush()
        typer.echo()
        completion = await stream.completion()
    common.notes.print(summary(completion), style="dim", soft_wrap=True)
    return completion.text
