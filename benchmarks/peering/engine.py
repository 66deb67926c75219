"""What is measured: an engine that is loaded once, takes turns, and rests while others have theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from benchmarks.peering.workload import Work
from dspark.errors import Unavailable

__all__ = ["Answer", "Engine", "checked"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn's: the generated ids of each prompt, the seconds of all, and what else the engine says of it."""

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    notes: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all streams over the time from the first prompt's arrival to the last token."""
        return sum(map(len, self.tokens)) / self.seconds


class Engine(Protocol):
    """For `async with`: entering loads it, leaving ends it."""

    name: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Its version (`engine`) and settings."""

    async def run(self, work: Work) -> Answer:
        """One turn; whatever it has to do before and after, like waking up, is not timed."""


def checked(name: str, work: Work, answer: Answer) -> Answer:
    """The answer; `Unavailable` where it is not what was asked for, which would make its speed meaningless."""
    lengths = sorted({len(tokens) for tokens in answer.tokens})
    if len(answer.tokens) != len(work.prompts) or lengths != [work.max_tokens]:
        raise Unavailable(
            f"{name} answered {len(work.prompts)} prompts with {len(answer.tokens)} texts of "
            f"{' or '.join(map(str, lengths)) or 'no'} tokens; each should have {work.max_tokens}"
        )
    if answer.seconds <= 0:
        raise Unavailable(f"{name} says that a turn took {answer.seconds:g} s")
    return answer
