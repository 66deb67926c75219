"""Where training prompts come from: files, Python's standard library, and nothing but the begin-of-sequence token.

Only prompts are taken; the target writes every response itself (DSpark §3.3). Prompts that are evaluated on are refused
by content. Leaves the answering to `training.responses`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dspark.errors import ConfigError
from dspark.tokenizer import Tokenizer

__all__ = ["Mix", "Prompt", "content_hash", "mixed", "read_hashes", "read_turns", "standard_library"]

Template = Literal["qa", "none"]
EVALUATION_HASHES = Path(__file__).with_name("evaluation_prompts.txt")
MIN_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to go on from, the temperature to do it at, and the seed of the noise."""

    token_ids: tuple[int, ...]
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Mix:
    """How many prompts, from where and at which temperatures, each drawn with equal probability.

    `code` and `bare` are shares of prompts from the standard library and of bare begin-of-sequence tokens; the rest
    comes from files.
    """

    count: int
    code: float = 0.3
    bare: float = 0.08
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.7, 1.0, 1.0, 1.0)
    max_tokens: int = 128
    seed: int = 0


def content_hash(text: str) -> str:
    """The first 16 hexadecimal digits of sha256 over the text, without regard to case and white space."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()[:16]


def read_hashes(path: Path = EVALUATION_HASHES) -> frozenset[str]:
    """Content hashes of the prompts that are evaluated on, one a line."""
    return frozenset(path.read_text(encoding="ascii").split())


def read_turns(path: Path) -> list[str]:
    """The first turn of each line `{"turns": ["…"]}`; `ConfigError` names a missing or empty file or a bad line."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt file {path}: {error}") from error
    if lines == [""]:
        raise ConfigError(f"prompt file {path} is empty")
    # Not splitlines(): a question may hold U+2028, which JSON leaves as it is.
    return [_turn(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _turn(path: Path, number: int, line: str) -> str:
    try:
        turn = json.loads(line)["turns"][0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f'{path}: line {number} is not {{"turns": ["…"]}}: {error}') from error
    if not isinstance(turn, str) or not turn.strip():
        raise ConfigError(f"{path}: line {number}: the first turn is not a text")
    return turn


def refuse_evaluation(path: Path, turns: Sequence[str], hashes: frozenset[str]) -> None:
    """`ConfigError` if any of the turns is a prompt that drafters are evaluated on."""
    for number, turn in enumerate(turns, 1):
        if content_hash(turn) in hashes:
            raise ConfigError(f"{path}: prompt {number} is one that drafters are evaluated on; it cannot be trained on")


def templated(text: str, template: Template) -> str:
    """The text as the prompt of a base model."""
    return f"Question: {text}\nAnswer:" if template == "qa" else text


def standard_library() -> Iterator[str]:
    """Prompts from this Python's own modules: heads of functions, tasks made of their docstrings, heads of modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"} & set(path.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield source[:600]
        yield from _functions(source, tree)


def _functions(source: str, tree: ast.Module) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        described = ast.get_docstring(node)
        if described:
            task = " ".join(described.split("\n\n")[0].split())
            yield templated(f"Write a python function {node.name}. {task}", "qa")
        body = node.body[1:2] if described else node.body[:4]
        end = body[-1].lineno if body else node.lineno
        yield "".join(lines[node.lineno - 1 : end])


def mixed(tokenizer: Tokenizer, texts: Sequence[str], mix: Mix) -> list[Prompt]:
    """`mix.count` prompts in random order, fewer where the sources have no more; longer ones are cut or left out.

    Texts from files are whole or not at all; code may begin anywhere and end anywhere.
    """
    choose = random.Random(mix.seed)  # noqa: S311  # a choice of training data
    code_wanted = round(mix.count * mix.code)
    bare_wanted = round(mix.count * mix.bare)
    asked = _take(tokenizer, texts, mix.count - code_wanted - bare_wanted, mix.max_tokens, choose, cut=False)
    code = (
        _take(tokenizer, list(standard_library()), code_wanted, mix.max_tokens, choose, cut=True) if code_wanted else []
    )
    bare = tuple(tokenizer.encode(""))
    if bare_wanted and not bare:
        raise ConfigError("this model begins texts with no token of its own: choose --bare-share 0")
    every = [*asked, *code, *([bare] * bare_wanted)]
    choose.shuffle(every)
    return [
        # A bare prompt's greedy response would always be the same.
        Prompt(ids, 1.0 if ids == bare else choose.choice(mix.temperatures), mix.seed * 1_000_003 + number)
        for number, ids in enumerate(every)
    ]


def digest(prompts: Iterable[Prompt]) -> str:
    """What tells one list of prompts from another: a sha256 over ids, temperatures and seeds."""
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(repr((prompt.token_ids, prompt.temperature, prompt.seed)).encode())
    return found.hexdigest()


def _take(
    tokenizer: Tokenizer, texts: Iterable[str], count: int, longest: int, choose: random.Random, *, cut: bool
) -> list[tuple[int, ...]]:
    taken: list[tuple[int, ...]] = []
    shuffled = list(texts)
    choose.shuffle(shuffled)
    for text in shuffled:
        if len(taken) >= count:
            break
        ids = tuple(tokenizer.encode(text))
        if cut and len(ids) > longest:
            ids = ids[: choose.randint(longest // 4, longest)]
        if MIN_TOKENS <= len(ids) <= longest:
            taken.append(ids)
    return taken
