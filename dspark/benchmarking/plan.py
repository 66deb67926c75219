"""What is measured, in which order, on which prompts. Pure: knows neither clients nor clocks.

A *cell* is one policy at one concurrency in one repeat. Within a repeat and concurrency the policies follow each other
directly and get the same prompts with the same seeds; who goes first changes from repeat to repeat. So what drifts on a
machine (its clock, its other work) meets all policies alike, and ratios are taken of neighbours in time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dspark.errors import ConfigError
from dspark.messages import Mode
from dspark.params import GenerateParams

__all__ = ["DEFAULT", "POLICY_FORMS", "Cell", "Job", "Plan", "fixed_length", "parse_concurrencies", "parse_policies"]

DEFAULT = "default"
"""Stands for the router's own policy."""
POLICY_FORMS = "none, fixed:N, threshold:X, adaptive, cap-accept, or default for the router's own"

_POLICY = re.compile(r"none|default|adaptive|cap-accept|fixed:[0-9]{1,3}|threshold:(0?\.[0-9]+|[01](\.0*)?)", re.ASCII)
_SEEDS = 2**64

Job = tuple[str, GenerateParams]
"""A prompt and how it is completed."""


def parse_policies(text: str) -> tuple[str, ...]:
    """Names with commas between, each once. `ConfigError` for one that no router knows, and where there is none."""
    names = tuple(dict.fromkeys(_plain(name.strip()) for name in text.split(",") if name.strip()))
    for name in names:
        if not _POLICY.fullmatch(name):
            raise ConfigError(f"policy {name!r} is none of {POLICY_FORMS}")
    if not names:
        raise ConfigError(f"no policy is named; known are {POLICY_FORMS}")
    return names


def _plain(name: str) -> str:
    length = fixed_length(name)
    return name if length is None else f"fixed:{length}"


def fixed_length(policy: str) -> int | None:
    """N of `fixed:N`; None for every other policy."""
    match = re.fullmatch(r"fixed:([0-9]{1,3})", policy, re.ASCII)
    return int(match[1]) if match else None


def parse_concurrencies(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1 with commas between, in ascending order. `ConfigError` for anything else."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not (name.isascii() and name.isdigit() and 1 <= int(name) <= 4096):
            raise ConfigError(f"concurrency {name!r} is no whole number from 1 to 4096")
    if not names:
        raise ConfigError("no concurrency is named")
    return tuple(sorted({int(name) for name in names}))


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one concurrency in one repeat; `order` counts all cells of a run."""

    repeat: int
    concurrency: int
    policy: str
    order: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    `requests` is the least number of requests of a cell: a cell has three times its concurrency where that is more.
    The first answers of a cell's users are cut to growing shares of `max_tokens`, so that users ask for the next one at
    different times from the beginning. If all began with whole answers, policies under which they get on alike would
    have everybody's prompts computed together, and the last of these never measured.
    """

    policies: tuple[str, ...]
    concurrencies: tuple[int, ...]
    repeats: int = 3
    requests: int = 16
    max_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    mode: Mode = Mode.COUPLED
    ignore_eos: bool = False

    @property
    def reference(self) -> str:
        """What every policy is compared with: `none` where it is measured, else the first."""
        return "none" if "none" in self.policies else self.policies[0]

    @property
    def reproducible(self) -> bool:
        """Whether every policy must give the same tokens."""
        return self.mode is Mode.COUPLED or self.temperature == 0

    def cells(self) -> Iterator[Cell]:
        """All cells, in the order in which they are measured."""
        order = 0
        for repeat in range(self.repeats):
            turn = repeat % len(self.policies)
            for concurrency in self.concurrencies:
                for policy in self.policies[turn:] + self.policies[:turn]:
                    yield Cell(repeat, concurrency, policy, order)
                    order += 1

    def size(self, concurrency: int) -> int:
        """Requests of a cell."""
        return max(self.requests, 3 * concurrency)

    def jobs(self, cell: Cell, prompts: Sequence[str]) -> list[Job]:
        """The cell's requests: the same for all policies, and others in every repeat and at every concurrency.

        The file is gone through in its order and begun again at its end; seeds are never used twice.
        """
        jobs = self.whole_jobs(cell, prompts)
        for user, (_, params) in enumerate(jobs[: cell.concurrency], start=1):
            params["max_tokens"] = -(-user * self.max_tokens // cell.concurrency)
        return jobs

    def whole_jobs(self, cell: Cell, prompts: Sequence[str]) -> list[Job]:
        """As `jobs`, with whole first answers."""
        begin = cell.repeat * sum(map(self.size, self.concurrencies))
        begin += sum(self.size(c) for c in self.concurrencies if c < cell.concurrency)
        numbers = range(begin, begin + self.size(cell.concurrency))
        return [(prompts[number % len(prompts)], self.params(number, cell.policy)) for number in numbers]

    def params(self, number: int, policy: str) -> GenerateParams:
        """The parameters of the run's request `number`."""
        params: GenerateParams = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": (self.seed + number) % _SEEDS,
            "mode": self.mode,
            "ignore_eos": self.ignore_eos,
        }
        return params if policy == DEFAULT else params | {"policy": policy}
