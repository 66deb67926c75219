"""DSpark Serving against what one would pick instead: the same model, prompts and machine, interleaved in one run.

    python -m benchmarks.peers --prompts FILE.jsonl --template qa --peer vllm=VENV --peer llama-cpp=VENV --gguf FILE

Each peer runs in a process of its own, from its own virtual environment (docs/peers.md says how they are built). Ours
is a whole cluster over gRPC. Everybody gets the same token ids, generates --max-tokens tokens for each whatever they
are, keeps no prefixes, and is paused while others have their turn. Tokens a second are generated tokens over the time
from the first prompt's arrival to the last token.

Another engine takes part with `--peer NAME=VENV --runner NAME=SCRIPT`: a script that speaks the line protocol of
benchmarks/peering/runners/line_protocol.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from rich.console import Console
from rich.table import Table

from benchmarks.peering.ours import Ours
from benchmarks.peering.peer import RUNNERS, Peer, find_python
from benchmarks.peering.ratios import Row
from benchmarks.peering.session import Session
from benchmarks.peering.workload import Workload
from dspark.benchmarking.plan import DEFAULT, POLICY_FORMS, parse_policies
from dspark.benchmarking.report import machine, write_json
from dspark.cluster import DEFAULT_MODEL
from dspark.errors import ConfigError, DSparkError
from dspark.evaluation import read_prompts
from dspark.messages import Mode
from dspark.models.pull import resolve_model

notes = Console(stderr=True, highlight=False)


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=Path, required=True, help='JSON lines {"turns": ["…"]}; the first turn is the prompt')
    add("--template", choices=("qa", "none"), default="none", help="qa: `Question: …\\nAnswer:`")
    add("--limit", type=int, default=32, help="use so many prompts")
    add("--peer", action="append", default=[], metavar="NAME=VENV", help=f"{', '.join(RUNNERS)}, or your own")
    add("--runner", action="append", default=[], metavar="NAME=SCRIPT", help="the script of a peer of your own")
    add("--gguf", type=Path, help="the same model for llama.cpp")
    add("--model", default=DEFAULT_MODEL, help="a name that `dspark models` knows, or a directory")
    add("--drafter", default="default", help="as of `dspark up`")
    add("--policy", default=DEFAULT, help=f"ours: {POLICY_FORMS}")
    add("--mode", type=Mode, choices=list(Mode), default=Mode.COUPLED, help="ours")
    add("--weights", choices=("plain", "int8"), help="ours; with int8 it is not quite the model that others run")
    add("--streams", type=int, nargs="+", default=[1, 8, 32])
    add(
        "--requests", type=int, nargs="+", default=[32], help="prompts of a turn: one number, or one for each --streams"
    )
    add("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    add("--max-tokens", type=int, default=128)
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each peer; ours takes all cores")
    add("--quiet", type=float, default=1.0, help="wait, and measure again, where others take more of the machine")
    add("--tries", type=int, default=4, help="turns at most; the quietest counts")
    add("--wait", type=float, default=60.0, help="seconds for the machine to become quiet")
    add("--log-dir", type=Path, help="keep the peers' logs here")
    add("--json", type=Path, help="write all to this file, after every repeat")
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> int:
    """Parse, run, show; the exit status."""
    try:
        return _main(arguments(line))
    except DSparkError as error:
        notes.print(f"peers: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM


def _main(args: argparse.Namespace) -> int:
    workload = _workload(args)
    commands = peer_commands(args.peer, args.runner)
    directory = resolve_model(args.model)
    prompts = encode(directory, read_prompts(args.prompts, limit=args.limit, template=args.template))
    logs = args.log_dir or Path(tempfile.mkdtemp(prefix="dspark-peers-"))
    logs.mkdir(parents=True, exist_ok=True)
    load = {
        "model": str(directory),
        "gguf": None if args.gguf is None else str(_existing(args.gguf)),
        "threads": args.threads,
        "streams": workload.streams,
        "context": workload.context(prompts),
    }
    peers = [Peer(name, command, load, logs / f"{name}.log") for name, command in commands.items()]
    ours = Ours(args.model, args.drafter, parse_policies(args.policy)[0], args.mode, weights=args.weights)
    _measure(Session(workload, [ours, *peers], prompts, args.quiet, args.tries, args.wait, hear=notes.print), args.json)
    return 0


def _measure(session: Session, json_file: Path | None) -> None:
    here = machine()

    def keep() -> None:
        if json_file is not None:
            write_json(json_file, {"machine": here, **session.report()})

    session.keep = keep
    try:
        asyncio.run(_supervised(session))
    finally:  # also what there is of a run that was stopped or failed
        if session.turns:
            keep()
            show(session.rows(), here, session.facts)


async def _supervised(session: Session) -> None:
    """SIGTERM and SIGHUP end the engines in an orderly way too."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await session.run()


def _workload(args: argparse.Namespace) -> Workload:
    requests = args.requests * len(args.streams) if len(args.requests) == 1 else args.requests
    return Workload(
        streams=tuple(args.streams),
        requests=tuple(requests),
        temperatures=tuple(args.temperature),
        repeats=args.repeats,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )


def peer_commands(peers: Sequence[str], runners: Sequence[str]) -> dict[str, list[str]]:
    """Each peer's command line, by name. `ConfigError` for a missing environment or script, or an unknown peer."""
    scripts = {name: [str(_existing(Path(path)))] for name, path in _pairs("--runner", runners)}
    commands = {}
    for name, environment in _pairs("--peer", peers):
        script = scripts.get(name) or RUNNERS.get(name)
        if script is None:
            raise ConfigError(f"--peer {name}: known are {', '.join(RUNNERS)}; any other needs --runner {name}=SCRIPT")
        commands[name] = [str(find_python(name, Path(environment).expanduser())), *script]
    return commands


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [tuple(text.split("=", 1)) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise ConfigError(f"{option} {text}: NAME=PATH is needed")
    return [(name, path) for name, path in pairs]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    return path.absolute()


def encode(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by the model's own tokenizer, its first special token included: what every engine is given."""
    path = model / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{model}: there is no tokenizer.json; a directory made by `dspark models` is needed")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return [list(tokenizer.encode(text).ids) for text in texts]


# ---------------------------------------------------------------- the table


def show(rows: Sequence[Row], here: dict[str, Any], facts: dict[str, Any]) -> None:
    """The table, the machine and the versions."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table(rows))
    console.print(f"{here['cpu']}, {here['cores']} cores, {here['date']}, load {here['load_average']:.1f}")
    for name, said in facts.items():
        console.print(f"{name}: {said.get('engine', '?')}", markup=False)


def table(rows: Sequence[Row]) -> Table:
    """One line for each setting and engine."""
    made = Table("T", "streams", "engine", "tokens/s", "ours over it", "same start", "τ", "others")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        made.add_row(
            f"{row.temperature:g}",
            str(row.streams),
            row.engine,
            f"{row.tokens_per_second:.1f} ({min(row.values):.1f}-{max(row.values):.1f})",
            "" if row.ratio is None else f"{row.ratio.median:.2f} ({row.ratio.low:.2f}-{row.ratio.high:.2f})",
            "" if row.common_start is None else f"{row.common_start:.0f}",
            f"{row.notes['tau']:.2f}" if "tau" in row.notes else "",
            f"{row.others:.0%}",
            end_section=following is not None
            and (following.temperature, following.streams) != (row.temperature, row.streams),
        )
    made.caption = (
        "Medians of the repeats with the least and the greatest; ratios are taken within a repeat. Same start: tokens "
        "that an engine's greedy answers share with ours before they part. Others: the most that programs outside took "
        "of the processors during a turn."
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
