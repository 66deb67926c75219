"""Times steps of made-up sequences at start, through an engine of its own over the worker's model and cache.

A point's tokens are spread over about a quarter as many sequences, one anchor and three drafts each, or fewer where
pages are short: 1 to 3 tokens are one sequence's. Drafts are nonsense at temperature 1, so most rows are judged as
rejected ones are. Contexts are presumed and not computed, since only their length takes time. No features are wanted.

Nothing stays: pages go back, none becomes reusable and none that is reusable goes, the worker's engine is not touched.
When what is timed, and what is kept, is `dspark.costs.measuring`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterator

from dspark.costs import CostProfile
from dspark.costs.corrections import BUCKETS
from dspark.costs.measuring import Shape, obtain
from dspark.errors import InternalError
from dspark.messages import ModelInfo, OpenSequence, Sampling, SequenceKey, StepItem
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from services.verifier.engine import EngineSettings, VerifyEngine
from services.verifier.sequences import SequenceState

__all__ = ["Rehearsal", "profile"]

CONTEXTS = 64, 512, 2048
ROWS = 4  # of a sequence


def profile(
    model: TargetModel,
    cache: KVCache,
    settings: EngineSettings,
    info: ModelInfo,
    *,
    fingerprint: str,
    choice: str,
    budget_seconds: float,
) -> CostProfile | None:
    """The costs of this worker's steps, kept or measured, as `dspark.costs.measuring.obtain` says."""
    if choice == "off":
        return None
    rehearsal = Rehearsal(VerifyEngine(model, cache, settings, info=info), cache)
    shapes = list(rehearsal.shapes())
    return obtain("verify", fingerprint, choice, shapes, rehearsal.time, budget_seconds=budget_seconds)


class Rehearsal:
    """Steps of any shape on an engine that serves nobody."""

    def __init__(self, engine: VerifyEngine, cache: KVCache) -> None:
        self._engine = engine
        self._cache = cache
        self._most = engine.settings.max_step_tokens

    def shapes(self) -> Iterator[Shape]:
        """Tokens and contexts that fit into one forward, the model's context and the pages that hold nothing."""
        tokens = sorted({self._most, *(int(centre) for centre in BUCKETS if centre < self._most)})
        for context in CONTEXTS:
            yield from ((count, context) for count in tokens if self._spread(count, context))

    def time(self, tokens: int, context: int) -> float:
        """Seconds of one step in the engine."""
        with self._cache.unshared():
            requests = list(self._requests(tokens, context))
            keys = [request.key for request in requests]
            try:
                for opened in self._engine.open(requests):
                    _check(opened.error)
                    self._presume(self._engine.find(opened.key))
                result = self._engine.step([_item(request) for request in requests])
                for request in requests:  # contexts stay as pages are when new: rows of no sense take longer to judge
                    self._cache.blank(self._engine.find(request.key).cached, len(request.token_ids) - 1)
            finally:
                self._engine.close(keys)
        for verdict in result.verdicts:
            _check(verdict.error)
        return result.total_seconds

    def _presume(self, state: SequenceState) -> None:
        """Take it for computed up to its anchor, whatever its pages hold, as if by prompt pieces of whole steps."""
        assert not self._cache.shares_prefixes, "such pages must never be given to others"
        while state.computed_len < state.committed_len - 1:
            state.computed_len = min(state.committed_len - 1, state.computed_len + self._most)
            self._cache.extend(state.cached, state.computed_len)
            self._cache.commit(state.cached, state.token_ids, state.computed_len)

    def _requests(self, tokens: int, context: int) -> Iterator[OpenSequence]:
        for number, rows in enumerate(self._spread(tokens, context)):
            ids = tuple((7919 * number + 31 * place) % self._engine.info.vocab_size for place in range(context))
            key = SequenceKey(f"rehearsal-{number}", 0)
            yield OpenSequence(key, ids, Sampling(seed=number), context + rows + 1, features=False)

    def _spread(self, tokens: int, context: int) -> list[int]:
        """Rows of each sequence; empty where the step does not fit."""
        for count in range(max(1, tokens // ROWS), 0, -1):
            rows, more = divmod(tokens, count)
            longest = context + rows + (more > 0) + 1
            if longest > self._engine.info.max_context:
                return []
            if count * self._pages(longest + self._cache.lookahead) <= self._free_pages:
                return [rows + (number < more) for number in range(count)]
        return []

    @property
    def _free_pages(self) -> int:
        """Pages that nobody holds and no prefix could need."""
        return self._cache.free_pages + self._pages(self._cache.lookahead) - self._cache.cached_pages

    def _pages(self, positions: int) -> int:
        return -(-positions // self._cache.page_size)


def _item(request: OpenSequence) -> StepItem:
    context = len(request.token_ids)
    drafts = (request.token_ids[place % context] for place in range(request.max_len - context - 2))
    return StepItem(request.key, context, 1, tuple(drafts))


def _check(error: Exception | None) -> None:
    if error is not None:
        raise InternalError(f"a step that was to be timed failed: {error}") from error
