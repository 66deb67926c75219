"""Prompts to train on: questions from a file, heads of Python's standard library, and nothing at all.

Only prompts come from a data set; the target writes every response itself (DSpark §3.3), at temperature 0 for half of
them and at higher ones for the rest. Leaves the writing to `training.collect`.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dspark.errors import ConfigError
from dspark.tokenizer import Tokenizer

TEMPERATURES = (0.7, 0.85, 1.0, 1.0)
CODE_SHARE = 0.19
BARE_SHARE = 0.015
MAX_PROMPT = 110


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to go on from, and the temperature to do it at."""

    token_ids: tuple[int, ...]
    temperature: float


def read_questions(path: Path) -> list[str]:
    """The first turn of each line `{"turns": [...]}`, as `Question: …` and `Answer:`; ConfigError names a bad line."""
    questions = []
    # Not splitlines(): a question may hold U+2028, which JSON leaves as it is.
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            questions.append(f"Question: {json.loads(line)['turns'][0]}\nAnswer:")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f'{path}: line {number} is not {{"turns": ["…"]}}: {error}') from error
    return questions


def standard_library() -> Iterator[str]:
    """The first 1,500 characters of this Python's own modules, in order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if not {"site-packages", "test", "tests"} & set(path.parts):
            yield path.read_text(encoding="utf-8", errors="replace")[:1500]


def mixed_prompts(tokenizer: Tokenizer, questions: list[str], count: int, *, seed: int) -> list[Prompt]:
    """`count` prompts, each of at most `MAX_PROMPT` tokens and beginning with the tokenizer's BOS."""
    choose = random.Random(seed)  # noqa: S311  # a choice of training data
    asked = [ids for question in questions if len(ids := tokenizer.encode(question)) <= MAX_PROMPT]
    heads = [ids for text in standard_library() if len(ids := tokenizer.encode(text)) > MAX_PROMPT // 2]
    code = [ids[: choose.randint(24, 90)] for ids in heads]
    choose.shuffle(asked)
    choose.shuffle(code)
    prompts: list[Prompt] = []
    while len(prompts) < count and asked:
        kind = choose.random()
        if kind < BARE_SHARE:
            ids = tokenizer.encode("")
        elif kind < BARE_SHARE + CODE_SHARE and code:
            ids = code.pop()
        else:
            ids = asked.pop()
        bare = len(ids) <= 1  # its greedy response would always be the same
        temperature = 0.0 if len(prompts) % 2 == 0 and not bare else choose.choice(TEMPERATURES)
        prompts.append(Prompt(ids, temperature))
    return prompts
