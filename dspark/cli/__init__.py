"""The `dspark` command. Each subcommand is a module of its own, imported when it is asked for.

Whatever goes wrong is one readable line on stderr: exit status 2 for wrong usage, 1 for everything else.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from dspark import __version__
from dspark.errors import DSparkError, Overloaded

__all__ = ["app", "main"]

# name -> module with a typer application `app`
_COMMANDS = {
    "up": "dspark.cli.up",
    "generate": "dspark.cli.generate",
    "chat": "dspark.cli.chat",
    "demo": "dspark.cli.demo",
    "evaluate": "dspark.cli.evaluate",
    "bench": "dspark.cli.bench",
    "profile": "dspark.cli.profile",
    "propose": "dspark.cli.propose",
    "models": "dspark.cli.models",
    "train": "dspark.cli.train",
    "calibrate": "dspark.cli.calibrate",
}


class _Commands(typer.core.TyperGroup):
    """The subcommands by name; a module is imported for its own command and for the list in `--help`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - the signature is the base class's
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - the signature is the base class's
        if cmd_name not in _COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(_COMMANDS[cmd_name]).app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dspark {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Serve language models with drafting and verification as separate services that scale apart."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; ends the process."""
    status = _run(arguments)
    # Connections that an error held are let go now: at the interpreter's own end, when gRPC's threads are gone, letting
    # go of one may wait for ever.
    gc.collect()
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> Any:
    try:
        app(args=None if arguments is None else list(arguments), prog_name="dspark")
    except SystemExit as done:
        return done.code
    except DSparkError as error:
        return _failed(_message(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone
        return 1
    except Exception as error:
        if os.environ.get("DSPARK_DEBUG"):
            raise
        return _failed(f"internal error: {type(error).__name__}: {error} (DSPARK_DEBUG=1 shows where)")
    return 0


def _message(error: DSparkError) -> str:
    hint = f" (try again in {error.retry_after:g} s)" if isinstance(error, Overloaded) else ""
    return f"error: {error}{hint}"


def _failed(line: str) -> int:
    typer.echo(" ".join(line.split()), err=True)
    return 1
