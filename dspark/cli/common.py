"""What several commands share: options, a connection to a router or to a cluster of one's own, running until told."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from dspark.client import Client
from dspark.cluster import DEFAULT_MODEL, Cluster
from dspark.errors import ConfigError

__all__ = ["ClusterSettings", "ModeName", "notes", "open_client", "read_text", "results", "run"]

T = TypeVar("T")


class ModeName(StrEnum):
    """Sampling modes by name."""

    coupled = "coupled"
    rejection = "rejection"


Router = Annotated[
    str | None,
    typer.Option(help="Use the router at HOST:PORT instead of a cluster of one's own.", envvar="DSPARK_ROUTER"),
]
Model = Annotated[
    str, typer.Option(help="A name that `dspark models` knows, or a directory or GGUF file.", envvar="DSPARK_MODEL")
]
Drafter = Annotated[
    str,
    typer.Option(
        help="A drafter's directory, `default` for the one that comes with the model, `ngram` for prompt lookup, "
        "or `none`."
    ),
]
Draft = Annotated[int, typer.Option(min=0, help="Draft workers of a cluster of one's own.")]
Verify = Annotated[int, typer.Option(min=1, help="Verify workers of a cluster of one's own.")]
Together = Annotated[
    bool | None,
    typer.Option(
        "--together/--apart",
        help="Whether the first draft and verify worker of a cluster of one's own are one process "
        "[together where there is one of each and no GPU].",
    ),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="How verify lengths are chosen: adaptive (the default), none, fixed:N, threshold:X, cap-accept.",
        envvar="DSPARK_POLICY",
    ),
]
VerifyLength = Annotated[
    int | None, typer.Option(min=0, help="Draft tokens verified a round at most, in a cluster of one's own.")
]
Trace = Annotated[
    Path | None, typer.Option(help="Write a line of JSON for every round to this file, in a cluster of one's own.")
]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16 or float32, in a cluster of one's own [the faster one here].")
]
LogDir = Annotated[Path | None, typer.Option(help="Keep the logs of a cluster of one's own here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """How to start a cluster of one's own, or which router to use instead."""

    router: str | None = None
    model: str = DEFAULT_MODEL
    drafter: str = "default"
    draft: int = 1
    verify: int = 1
    policy: str | None = None
    verify_length: int | None = None
    dtype: str | None = None
    log_dir: Path | None = None
    verify_args: tuple[str, ...] = field(default=())
    draft_args: tuple[str, ...] = field(default=())
    trace: Path | None = None
    together: bool | None = None

    def cluster(self, **changes: Any) -> Cluster:
        """The cluster, not yet started; `changes` are further arguments of `Cluster`."""
        dtype = ("--dtype", self.dtype) if self.dtype else ()
        settings: dict[str, Any] = {
            "draft": self.draft,
            "verify": self.verify,
            "together": self.together,
            "policy": self.policy,
            "verify_length": self.verify_length,
            "log_dir": self.log_dir,
            "verify_args": (*dtype, *self.verify_args),
            "draft_args": (*dtype, *self.draft_args),
            "router_args": ("--trace", str(self.trace.absolute())) if self.trace else (),
        }
        return Cluster(self.model, self.drafter, **(settings | changes))


results = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
notes = Console(stderr=True, highlight=False)
"""Where everything goes that is not the result."""


def note_drafter(cluster: Cluster, settings: ClusterSettings) -> None:
    """Say so where a cluster decodes plainly although nobody asked for that."""
    if cluster.drafter is None and settings.drafter == "default":
        notes.print(f"No drafter comes with {settings.model}: decoding plainly.", style="yellow")


@asynccontextmanager
async def open_client(settings: ClusterSettings) -> AsyncIterator[Client]:
    """A client of the router named in the settings, or of a cluster that lives as long as this block."""
    if settings.router is not None:
        async with Client(settings.router) as client:
            yield client
        return
    cluster = settings.cluster()
    with notes.status(f"Starting a cluster for {settings.model} …"):
        await cluster.__aenter__()
    try:
        note_drafter(cluster, settings)
        async with cluster.client() as client:
            yield client
    finally:
        await cluster.__aexit__(*sys.exc_info())


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's coroutine; Ctrl-C, SIGTERM and SIGHUP end it in an orderly way."""

    async def supervised() -> T:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        return asyncio.run(supervised())
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


def read_text(argument: str) -> str:
    """A prompt given on the command line; `-` reads it from stdin. `ConfigError` where it is no UTF-8."""
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not UTF-8: {error}") from error
