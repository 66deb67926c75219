"""Times drafts of whole blocks for made-up sequences at start, through the worker's own engine.

Contexts are zeros: only their length takes time. Nothing stays: every sequence is detached, and load and costs do not
remember the drafts. When what is timed, and what is kept, is `dspark.costs.measuring`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dspark.costs import CostProfile
from dspark.costs.measuring import Shape, obtain
from dspark.errors import InternalError
from dspark.messages import AttachSequence, ProposeItem, Sampling, SequenceKey
from services.draft.context import PAGE_SIZE
from services.draft.engine import DraftEngine

__all__ = ["profile", "rehearsal"]

CONTEXTS = 64, 512
REQUESTS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64
_SLACK = 64  # positions of a sequence beside its context: the block's own
_WHOLE_BLOCK = 1024


def profile(
    engine: DraftEngine, feature_size: int, *, fingerprint: str, choice: str, budget_seconds: float
) -> CostProfile | None:
    """The costs of this worker's drafts, kept or measured, as `dspark.costs.measuring.obtain` says."""
    if choice == "off":
        return None
    with rehearsal(engine, feature_size) as timed:
        return obtain("draft", fingerprint, choice, timed.shapes, timed.time, budget_seconds=budget_seconds)


@contextmanager
def rehearsal(engine: DraftEngine, feature_size: int) -> Iterator[Rehearsal]:
    """Sequences to draft for, as many as there is room for; detached at the end."""
    own = Rehearsal(engine, feature_size)
    try:
        yield own
    finally:
        own.detach()


class Rehearsal:
    """Drafts for 1 … 64 sequences at each context, attached once they are needed: a kept profile needs few."""

    def __init__(self, engine: DraftEngine, feature_size: int) -> None:
        self._engine = engine
        self._feature_size = feature_size
        self._keys: dict[int, list[SequenceKey]] = {context: [] for context in CONTEXTS}
        self._most: dict[int, int] = {}
        room = PAGE_SIZE * engine.load().free_pages
        for context in CONTEXTS:  # longer ones get what is left
            self._most[context] = min(REQUESTS[-1], room // (context + _SLACK))
            room -= self._most[context] * (context + _SLACK)

    @property
    def shapes(self) -> list[Shape]:
        """Requests and contexts that can be timed."""
        return [(count, context) for context, most in self._most.items() for count in REQUESTS if count <= most]

    def attach(self, requests: int, context: int) -> list[SequenceKey]:
        """So many sequences of a context."""
        keys = self._keys.setdefault(context, [])
        for number in range(len(keys), requests):
            keys.append(SequenceKey(f"rehearsal-{context}-{number}", 0))
            self._engine.attach(AttachSequence(keys[-1], "", Sampling(seed=number), context))
            self._engine.extend(keys[-1], torch.zeros(context - 1, self._feature_size), range(1, context))
        return keys[:requests]

    def detach(self) -> None:
        """Give all of it back."""
        for keys in self._keys.values():
            self._engine.detach(keys)

    def time(self, requests: int, context: int) -> float:
        """Seconds of one draft in the engine."""
        keys = self.attach(requests, context)
        result = self._engine.answer([ProposeItem(key, context, 0, _WHOLE_BLOCK) for key in keys])
        for proposal in result.proposals:
            if proposal.error is not None:
                raise InternalError(f"a draft that was to be timed failed: {proposal.error}") from proposal.error
        return result.total_seconds
