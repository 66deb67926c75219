"""Runs prompts through a router and counts: accepted length, acceptance by position, speed, equality with a reference.

Counts are the router's own, taken before stop truncation and without prefill, so that
τ = (accepted + rounds) / rounds (DSpark §2.1). Knows clients; where the router comes from is the caller's affair.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dspark.client import Client
from dspark.errors import ConfigError, Overloaded
from dspark.events import Completion, Delta, Event, Speculation, completion_of
from dspark.messages import Mode
from dspark.params import GenerateParams, Prompt

__all__ = ["Evaluation", "Settings", "Template", "evaluate", "read_prompts"]

Template = Literal["qa", "none"]
_MAX_RETRIES = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """How the prompts are run. Prompt i is sampled with seed + i."""

    max_tokens: int = 128
    temperature: float = 1.0
    seed: int = 0
    mode: Mode = Mode.COUPLED
    speculation: bool = True
    concurrency: int = 1
    policy: str | None = None

    def params(self, index: int) -> GenerateParams:
        """The parameters of prompt `index`."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": (self.seed + index) % 2**64,
            "mode": self.mode,
            "speculation": self.speculation,
            "policy": self.policy,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of it.

    `completions` are in the order of the prompts, as are `chunks`: how many tokens each event of a stream brought.
    `seconds` is the wall clock of all.
    """

    completions: tuple[Completion, ...]
    seconds: float
    chunks: tuple[tuple[int, ...], ...] = ()

    @property
    def counts(self) -> Speculation:
        """All speculation counts added up."""
        return Speculation.total(completion.speculation for completion in self.completions)

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second_per_stream(self) -> float:
        """Tokens over the time that the streams ran, queueing excluded."""
        timings = [completion.timings for completion in self.completions]
        running = sum(timing.total_seconds - timing.queue_seconds for timing in timings)
        return self.tokens / running if running > 0 else 0.0

    def figures(self) -> dict[str, Any]:
        """The figures by name, as JSON has them."""
        counts = self.counts
        return {
            "tau": counts.tau,
            "conditional_acceptance": list(counts.conditional_acceptance),
            "verify_length": counts.verify_length,
            "drafted": counts.drafted,
            "verified": counts.verified,
            "accepted": counts.accepted,
            "rejected": counts.rejected,
            "alternatives": counts.alternatives,
            "turned": counts.turned,
            "rounds": counts.rounds,
            "missed_rounds": counts.missed_rounds,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_stream": self.tokens_per_second_per_stream,
        }

    def gains(self, index: int) -> tuple[int, ...] | None:
        """Tokens that each round of a prompt brought, cut where its text ends; None where they cannot be told.

        A router sends the prompt step's token and then a round an event, unless its client reads so slowly that it has
        to join some, or the stream has moved to another worker: then there is not one event a round.
        """
        chunks = self.chunks[index]
        return chunks[1:] if len(chunks) == self.completions[index].speculation.rounds + 1 else None

    def equal_to(self, reference: Evaluation) -> list[bool]:
        """For each prompt, whether both gave the same token ids."""
        pairs = zip(self.completions, reference.completions, strict=True)
        return [ours.token_ids == theirs.token_ids for ours, theirs in pairs]


def read_prompts(path: Path, *, limit: int | None = None, template: Template = "none") -> list[str]:
    """The first turn of each JSON line `{"turns": ["…"]}`. `ConfigError` names the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts in {path}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not numbered:
        raise ConfigError(f"{path} has no prompts")
    return [_wrapped(_first_turn(line, f"{path}:{number}"), template) for number, line in numbered]


def _first_turn(line: str, where: str) -> str:
    try:
        turn = json.loads(line)["turns"][0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f'{where}: not a line like {{"turns": ["…"]}} ({error!r})') from error
    if not isinstance(turn, str):
        raise ConfigError(f"{where}: the first turn is no text")
    return turn


def _wrapped(prompt: str, template: Template) -> str:
    return f"Question: {prompt}\nAnswer:" if template == "qa" else prompt


async def evaluate(
    client: Client, prompts: Sequence[Prompt], settings: Settings, *, progress: Callable[[int], None] = lambda _: None
) -> Evaluation:
    """Runs every prompt, at most `settings.concurrency` at a time; `progress` hears of each one that is done.

    A full queue is waited for; any other error of any prompt ends the evaluation.
    """
    slots = asyncio.Semaphore(settings.concurrency)

    async def run(index: int) -> list[Event]:
        async with slots:
            events = await _stream(client, prompts[index], settings.params(index))
        progress(index)
        return events

    started = time.monotonic()
    tasks = [asyncio.create_task(run(index)) for index in range(len(prompts))]
    try:
        streams = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    seconds = time.monotonic() - started
    chunks = (tuple(len(event.token_ids) for event in events if isinstance(event, Delta)) for events in streams)
    return Evaluation(tuple(map(completion_of, streams)), seconds, tuple(chunks))


async def _stream(client: Client, prompt: Prompt, params: GenerateParams) -> list[Event]:
    for _ in range(_MAX_RETRIES):
        try:
            return await _events(client, prompt, params)
        except Overloaded as error:
            await asyncio.sleep(error.retry_after)
    return await _events(client, prompt, params)


async def _events(client: Client, prompt: Prompt, params: GenerateParams) -> list[Event]:
    async with client.generate(prompt, **params) as stream:
        return [event async for event in stream]
