"""Recomputes features that pages lack: for a tap registered late, or for cached text that wanted none at the time.

A shadow of the sequence runs over the same ids on pages of its own, a few rows at a time while no step waits, and
writes features only. It never uses the prefix cache (cached positions have no hidden states left) and is never put
into it. Pages are the sequences' before they are the shadow's: a request that lacks them takes the shadow's away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.errors import OutOfPages
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import CachedSequence, KVCache
from dspark.models.target import TargetModel
from services.verifier.features import FeatureStore
from services.verifier.sequences import SequenceState

__all__ = ["Backfill", "Recomputation"]


@dataclass(slots=True)
class Recomputation:
    """One sequence: positions 0 … end - 1 are run again, `done` of them so far."""

    state: SequenceState
    end: int
    shadow: CachedSequence | None = None
    done: int = 0


class Backfill:
    """A queue of sequences with missing features, run piece by piece. For the engine's thread."""

    def __init__(self, model: TargetModel, cache: KVCache, features: FeatureStore, *, rows: int = 32) -> None:
        """`rows`: of one piece, which is how long a step may have to wait for it."""
        self._model = model
        self._cache = cache
        self._features = features
        self._rows = rows
        self._jobs: dict[str, Recomputation] = {}
        self._starved = False

    @property
    def ready(self) -> bool:
        """Whether `run_piece` has something to do now."""
        return bool(self._jobs) and not self._starved

    @property
    def held_pages(self) -> int:
        """Pages that shadows would give back at once, at least."""
        return sum(job.end // self._cache.page_size for job in self._jobs.values() if job.shadow is not None)

    def want(self, state: SequenceState) -> None:
        """Recompute what the sequence has computed without features. A job that runs already is left alone."""
        if state.key.sequence_id not in self._jobs:
            self._jobs[state.key.sequence_id] = Recomputation(state, state.computed_len)

    def cancel(self, state: SequenceState) -> None:
        """The sequence is closed."""
        job = self._jobs.pop(state.key.sequence_id, None)
        if job is not None:
            self._release(job)
        self.pages_freed()

    def pages_freed(self) -> None:
        """A shadow that found no pages may try again."""
        self._starved = False

    def yield_pages(self) -> bool:
        """Give all shadows' pages back; they start over later. Whether there were any."""
        held = [job for job in self._jobs.values() if job.shadow is not None]
        for job in held:
            self._release(job)
        self._starved = bool(self._jobs)
        return bool(held)

    def run_piece(self) -> Recomputation | None:
        """Compute the next rows of the oldest job. Returns the job once all of its features are there."""
        job = next(iter(self._jobs.values()))
        if job.shadow is None and not self._start(job):
            return None
        end = min(job.end, job.done + self._rows)
        try:
            self._compute(job, end)
        except BaseException:
            self.cancel(job.state)  # a piece that fails once would fail forever
            raise
        job.done = end
        if end < job.end:
            return None
        del self._jobs[job.state.key.sequence_id]
        self._release(job)
        return job

    def _start(self, job: Recomputation) -> bool:
        try:
            job.shadow = self._cache.open(job.state.token_ids[: job.end], job.end, reuse=False)
        except OutOfPages:
            self._starved = True
        job.done = 0
        return job.shadow is not None

    def _compute(self, job: Recomputation, end: int) -> None:
        assert job.shadow is not None
        ids = job.state.token_ids
        batch = RaggedBatch.build([(job.shadow, ids[job.done : end], job.done)])
        with torch.inference_mode():
            captured = self._model.forward(batch, self._cache, capture=self._features.layers).captured
            self._features.write(captured, [(end - job.done, job.state.cached.full_pages, job.done)])
        self._cache.commit(job.shadow, ids[: job.end], end)

    def _release(self, job: Recomputation) -> None:
        if job.shadow is not None:
            self._cache.close(job.shadow)
        job.shadow = None
