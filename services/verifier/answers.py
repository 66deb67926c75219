"""What each caller of a step is told: its own verdicts, and what the others in the step came to.

A router judges drafts by what everybody in its steps had of the time. Knows calls and verdicts, not how they were made.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dspark.messages import StepItem, StepResult, Verdict
from services.verifier.calls import Call

__all__ = ["answers"]


@dataclass(frozen=True, slots=True)
class _Part:
    """One caller's share of a step: rows, those inside prompts among them, sequences that got tokens, and how many.

    What was refused had no rows.
    """

    rows: int
    prompt_rows: int
    sequences: int
    tokens: int


def answers(result: StepResult, calls: Sequence[Call], began: float) -> list[StepResult]:
    """One for each call, in their order. `began`: when their step did."""
    verdicts = iter(result.verdicts)
    own = [tuple(itertools.islice(verdicts, len(call.items or ()))) for call in calls]
    told = [
        replace(result, verdicts=mine, queue_seconds=max(0.0, began - call.queued_at - call.delayed))
        for call, mine in zip(calls, own, strict=True)
    ]
    if len(calls) == 1:
        return told
    parts = [_part(call.items or (), mine) for call, mine in zip(calls, own, strict=True)]
    return [_beside(answer, parts[:number] + parts[number + 1 :]) for number, answer in enumerate(told)]


def _beside(answer: StepResult, others: Sequence[_Part]) -> StepResult:
    return replace(
        answer,
        other_tokens=sum(part.rows for part in others),
        other_prompt_tokens=sum(part.prompt_rows for part in others),
        other_sequences=sum(part.sequences for part in others),
        other_gained=sum(part.tokens for part in others),
    )


def _part(items: Sequence[StepItem], verdicts: Sequence[Verdict]) -> _Part:
    rows = prompts = sequences = tokens = 0
    for item, verdict in zip(items, verdicts, strict=True):
        if verdict.error is not None:
            continue
        gained = len(item.committed(verdict))
        rows += item.rows
        prompts += max(0, item.count - (gained > 0))
        sequences += gained > 0
        tokens += gained
    return _Part(rows, prompts, sequences, tokens)
