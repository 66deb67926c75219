"""A closed loop: so many users, each with one request at a time and the next one at once. Notes when tokens came.

Knows clients and a clock; what the times mean is `dspark.benchmarking.figures`' affair.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark.client import Client
from dspark.errors import DSparkError, Overloaded
from dspark.events import Delta, Event, Finished, Speculation
from dspark.params import GenerateParams, Prompt

__all__ = ["Run", "Task", "Timing", "closed_loop"]

Task = tuple[Prompt, GenerateParams]
"""A prompt and how it is completed."""

_PAUSE_SECONDS = 0.1
"""A user whose request failed rests so long, lest a broken router be asked thousands of times a second."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One request as its client saw it, in seconds since the run began.

    `arrivals` are the times at which tokens came, and how many; `outcome` stands for the tokens themselves
    (`token_ids`): equal for equal ones. A failed request has an `error` and what came before it.
    """

    index: int
    submitted: float
    arrivals: tuple[tuple[float, int], ...] = ()
    speculation: Speculation = field(default_factory=Speculation)
    cached_tokens: int = 0
    outcome: int = 0
    token_ids: tuple[int, ...] = ()
    error: DSparkError | None = None

    @property
    def tokens(self) -> int:
        """How many came."""
        return sum(count for _, count in self.arrivals)


@dataclass(frozen=True, slots=True)
class Run:
    """A closed loop's requests in the order in which they were made.

    Attributes:
        concurrency: users.
        timings: the first `concurrency` of them are the users' first ones.
        ran_out: when the first user found nothing left to ask.
        seconds: when the last answer had come.
    """

    concurrency: int
    timings: tuple[Timing, ...]
    ran_out: float
    seconds: float


async def closed_loop(
    client: Client, jobs: Sequence[Task], concurrency: int, *, progress: Callable[[], None] = lambda: None
) -> Run:
    """Has `concurrency` users work off the jobs. A request's own failure is noted and ends nothing."""
    began = time.monotonic()
    todo = iter(enumerate(jobs))  # shared: whoever is free takes the next
    timings: list[Timing] = []
    idle: list[float] = []

    async def user() -> None:
        for index, job in todo:
            timings.append(await _timed(client, index, job, began))
            progress()
            if timings[-1].error is not None:
                await asyncio.sleep(_pause(timings[-1].error))
        idle.append(time.monotonic() - began)

    async with asyncio.TaskGroup() as users:
        for _ in range(concurrency):
            users.create_task(user())
    timings.sort(key=lambda timing: timing.index)
    return Run(concurrency, tuple(timings), min(idle), max(idle))


async def _timed(client: Client, index: int, job: Task, began: float) -> Timing:
    prompt, params = job
    submitted = time.monotonic() - began
    arrivals: list[tuple[float, int]] = []
    events: list[Event] = []
    error = None
    try:
        async with client.generate(prompt, **params) as stream:
            async for event in stream:
                if isinstance(event, Delta) and event.token_ids:
                    arrivals.append((time.monotonic() - began, len(event.token_ids)))
                events.append(event)
    except DSparkError as failure:
        error = failure
    end = next((event for event in events if isinstance(event, Finished)), None)
    token_ids = tuple(token for event in events if isinstance(event, Delta) for token in event.token_ids)
    return Timing(
        index=index,
        submitted=submitted,
        arrivals=tuple(arrivals),
        speculation=end.speculation if end else Speculation(),
        cached_tokens=end.usage.cached_tokens if end else 0,
        outcome=hash(token_ids),
        token_ids=token_ids,
        error=error,
    )


def _pause(error: DSparkError | None) -> float:
    return error.retry_after if isinstance(error, Overloaded) else _PAUSE_SECONDS
