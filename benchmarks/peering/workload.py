"""What is run, in which order, on which prompts. Pure: knows neither engines nor clocks.

A *cell* is one temperature at one number of streams in one repeat; in it every engine has one *turn*, with the same
token ids and seeds, one directly after the other, and who goes first changes from repeat to repeat. So what drifts on a
machine meets all alike, and ratios are taken of neighbours in time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dspark.errors import ConfigError

__all__ = ["Cell", "Work", "Workload"]

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Cell:
    """One temperature and number of streams in one repeat."""

    repeat: int
    temperature: float
    streams: int

    @property
    def setting(self) -> tuple[float, int]:
        """What its repeats have in common."""
        return self.temperature, self.streams


@dataclass(frozen=True, slots=True)
class Work:
    """One turn's: prompts as token ids, and how they are completed. Prompt i is sampled with seed + i."""

    prompts: tuple[tuple[int, ...], ...]
    streams: int
    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured.

    `requests` has one number for each of `streams`: the prompts of a turn, of which there are always at least as many
    as there are streams.
    """

    streams: tuple[int, ...]
    requests: tuple[int, ...]
    temperatures: tuple[float, ...] = (0.0, 1.0)
    repeats: int = 3
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.requests) != len(self.streams):
            raise ConfigError(f"--requests has {len(self.requests)} numbers, but --streams {len(self.streams)}")
        for streams, requests in zip(self.streams, self.requests, strict=True):
            if not 1 <= streams <= requests:
                raise ConfigError(f"{requests} requests cannot keep {streams} streams busy")

    def cells(self) -> Iterator[Cell]:
        """In the order in which they are measured."""
        for repeat in range(self.repeats):
            for streams in self.streams:
                for temperature in self.temperatures:
                    yield Cell(repeat, temperature, streams)

    def turns(self, cell: Cell, engines: Sequence[str]) -> list[str]:
        """Who goes when: another first in each repeat."""
        first = cell.repeat % len(engines)
        return [*engines[first:], *engines[:first]]

    def work(self, cell: Cell, prompts: Sequence[Ids]) -> Work:
        """The same for every engine; the next repeat goes on with the prompts that follow, and other seeds."""
        count = self.requests[self.streams.index(cell.streams)]
        begin = cell.repeat * count
        chosen = (prompts[number % len(prompts)] for number in range(begin, begin + count))
        return self._work(tuple(map(tuple, chosen)), cell.streams, cell.temperature, self.seed + begin)

    def warm_up(self, prompts: Sequence[Ids]) -> list[Work]:
        """A few tokens at every setting, the most streams first; what it takes is thrown away."""
        counts = sorted(self.streams, reverse=True)
        works = [Work(tuple(map(tuple, prompts[:n])), n, t, 8, self.seed) for n in counts for t in self.temperatures]
        return [work for work in works if work.prompts]

    def _work(self, prompts: tuple[tuple[int, ...], ...], streams: int, temperature: float, seed: int) -> Work:
        return Work(prompts, streams, temperature, self.max_tokens, seed)

    def context(self, prompts: Sequence[Ids]) -> int:
        """Tokens that the longest prompt and its completion need."""
        return max(map(len, prompts)) + self.max_tokens + 1
