"""One forward and what it commits: rows to hidden states, logits, outcomes, verdicts.

Knows the model, the cache and the arithmetic of rows. Which items are served is decided before (`sequences.plan`);
what becomes of the hidden states is `held.py`'s business.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from dspark.messages import Sampling, Verdict
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import CachedSequence, KVCache
from dspark.models.target import TargetModel
from dspark.sampling.scratch import scratch
from services.verifier.candidates import Candidate, Judge, Outcome, with_alternatives
from services.verifier.features import FeatureStore
from services.verifier.kernels import verifier_kernels
from services.verifier.sequences import Work

__all__ = ["Computed", "Stepper", "first_rows", "split", "warm_up"]

SAMPLED_BYTES = {
    "cpu": 24 << 20,  # of logits at a time: 24 rows in float32 over 262k tokens; memory is kept for up to 32 MiB
    "kept": 64 << 20,  # in memory that lives on: head weights are read once for so many rows
    "cuda": 128 << 20,
}

_FEW = 16  # rows of a step that should not be slow when it first comes
_REHEARSED = 0.5  # seconds

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """One forward done: its work in row order, verdicts in the same order, and the states that features come from."""

    work: tuple[Work, ...]
    verdicts: tuple[Verdict, ...]
    captured: Mapping[int, Tensor]
    forward_seconds: float
    sample_seconds: float


class Stepper:
    """Runs admitted work through the model and commits what it came to."""

    def __init__(self, model: TargetModel, cache: KVCache, features: FeatureStore, *, noise_candidates: int) -> None:
        self._model = model
        self._cache = cache
        self._features = features
        self._noise_candidates = noise_candidates
        self._judge = judge(model, noise_candidates)

    @torch.inference_mode()
    def run(self, work: Sequence[Work]) -> Computed:
        """One forward over all the work (rows together at most what the model should see at once)."""
        began = time.perf_counter()
        with self._forked(work) as forks:
            batch = RaggedBatch.build([entry for own, forked in forks.items() for entry in _entries(own, forked)])
            wanted = any(own.state.request.features for own in forks)
            forward = self._model.forward(batch, self._cache, capture=self._features.layers if wanted else frozenset())
            self._wait()
            sampled = time.perf_counter()
            outcomes = self._sample(forward.hidden, list(forks))
            verdicts = tuple(self._commit(own, outcomes.get(own), forked) for own, forked in forks.items())
        ended = time.perf_counter()
        return Computed(tuple(forks), verdicts, forward.captured, sampled - began, ended - sampled)

    @contextmanager
    def _forked(self, work: Sequence[Work]) -> Iterator[dict[Work, list[CachedSequence]]]:
        """The work with a fork of its sequence for each alternative; without those for which there is no page."""
        with ExitStack() as given_back:
            forks = {}
            for own in work:
                made = self._forks(own, given_back)
                whole = len(made) == len(own.alternatives)
                forks[own if whole else replace(own, alternatives=own.alternatives[: len(made)])] = made
            yield forks

    def _forks(self, own: Work, given_back: ExitStack) -> list[CachedSequence]:
        made: list[CachedSequence] = []
        for alternative in own.alternatives:
            fork = self._cache.fork(own.state.cached, own.state.committed_len - 1 + alternative.place)
            if fork is None:
                break
            given_back.callback(self._cache.join, fork)
            made.append(fork)
        return made

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Steps of few rows, with the present taps' layers, each once: where the first of a kind takes longer.

        With and without an alternative, for half a second at most. Where there is no room, nothing is done.
        """
        size = self._cache.page_size
        if not self._model.remembers or self._cache.free_pages < 2:
            return
        until = time.perf_counter() + _REHEARSED
        sequence = self._cache.open([0] * size, 2 * size, reuse=False)
        fork = self._cache.fork(sequence, 1)
        kinds = [[], [(fork, [0], 1)]] if fork is not None else [[]]
        try:
            for count, beside in itertools.product(range(1, _FEW), kinds):
                if time.perf_counter() < until:
                    batch = RaggedBatch.build([(sequence, [0] * count, 0), *beside])
                    self._model.forward(batch, self._cache, capture=self._features.layers)
        finally:
            if fork is not None:
                self._cache.join(fork)
            self._cache.close(sequence)

    def _sample(self, hidden: Tensor, work: Sequence[Work]) -> dict[Work, Outcome]:
        """What the items that reach their anchor came to."""
        anchored = [(own, first + own.count - 1) for own, first in first_rows(work) if own.reaches_anchor]
        outcomes: dict[Work, Outcome] = {}
        for part in split(anchored, self._sampled_rows(hidden), lambda entry: _judged(entry[0])):
            rows = [row for own, first in part for row in range(first, first + _judged(own))]
            whole = len(rows) == len(hidden)  # as mostly while decoding: then they are in order
            states = hidden if whole else hidden[torch.tensor(rows, device=hidden.device)]
            chosen = self._judge(states, _candidates(part))
            outcomes |= zip((own for own, _ in part), chosen, strict=True)
        return outcomes

    def _sampled_rows(self, hidden: Tensor) -> int:
        """Rows whose logits there are at a time."""
        where = "kept" if self._model.written_logits else hidden.device.type
        row = self._model.config.vocab_size * hidden.element_size()
        return max(1, SAMPLED_BYTES.get(where, SAMPLED_BYTES["cpu"]) // row)

    def _commit(self, work: Work, outcome: Outcome | None, forks: Sequence[CachedSequence]) -> Verdict:
        state = work.state
        if outcome is None:
            verdict = state.advance(work)
        elif outcome.error is not None:
            return state.refuse(outcome.error)
        else:
            if outcome.turned:
                row, _ = work.alternative(outcome.accepted + 1)
                self._cache.adopt(forks[row - work.count - len(work.draft_tokens)])
            verdict = state.extend(work, outcome)
        self._cache.commit(state.cached, state.token_ids, state.computed_len)
        return verdict

    def _wait(self) -> None:
        """So that times are those of the work and not of its launch."""
        if self._cache.device.type == "cuda":
            torch.cuda.synchronize(self._cache.device)


def _entries(own: Work, forks: Sequence[CachedSequence]) -> Iterator[tuple[CachedSequence, Sequence[int], int]]:
    """Of a batch: the item's sequence, then that of each alternative."""
    yield own.state.cached, own.row_ids, own.start
    for fork, alternative in zip(forks, own.alternatives, strict=True):
        yield fork, [alternative.token], fork.computed_len


def _judged(own: Work) -> int:
    """Rows from the anchor on."""
    return 1 + own.rows - own.count


def judge(model: TargetModel, noise_candidates: int) -> Callable[[Tensor, Sequence[Candidate]], list[Outcome]]:
    """Verdicts on requests from their hidden rows: by bounds on logits where the model has a screen, or by logits."""
    kernels = verifier_kernels(model.kernels)

    def logits(hidden: Tensor) -> Tensor:
        if not (width := model.written_logits):
            return model.logits(hidden)
        return model.logits(hidden, scratch.take("sampled", len(hidden), width, hidden.device, hidden.dtype))

    def by_bounds(hidden: Tensor, candidates: Sequence[Candidate]) -> list[Outcome]:
        def whole(rows: Sequence[int]) -> Tensor:
            return logits(hidden[torch.tensor(rows)])

        assert kernels.screened is not None
        return kernels.screened(hidden, candidates, screen=model.screen, whole=whole, noise_candidates=noise_candidates)

    def by_logits(hidden: Tensor, candidates: Sequence[Candidate]) -> list[Outcome]:
        by: Judge = partial(kernels.verify, logits(hidden), noise_candidates=noise_candidates)
        return with_alternatives(by, candidates)

    return by_logits if model.screen is None else by_bounds


def first_rows(work: Sequence[Work]) -> Iterator[tuple[Work, int]]:
    """Each item with the index of its first row."""
    first = 0
    for own in work:
        yield own, first
        first += own.rows


def _candidates(part: Sequence[tuple[Work, int]]) -> list[Candidate]:
    candidates, first = [], 0
    for own, _ in part:
        state = own.state
        position = state.committed_len
        drafts = own.draft_tokens, own.draft_distributions, own.alternatives
        candidates.append(Candidate(state.request.sampling, first, position, *drafts))
        first += _judged(own)
    return candidates


def split(entries: Sequence[T], limit: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of entries of at most `limit` together, in order; a larger entry is a run of its own."""
    part: list[T] = []
    room = limit
    for entry in entries:
        if part and size(entry) > room:
            yield part
            part, room = [], limit
        part.append(entry)
        room -= size(entry)
    if part:
        yield part


@torch.inference_mode()
def warm_up(model: TargetModel, cache: KVCache, noise_candidates: int, rows: Sequence[int] = (32, 8, 1)) -> None:
    """Run every part at several sizes, so that the first request does not pay for what is done lazily.

    But for whole logits where the model has a screen, which are laid out for the first request that wants them. Layers
    run as often as it takes until they are only repeated (`dspark.kernels.repeated`). Nothing stays behind: the pages
    are given back and none is hashed.
    """
    judged = judge(model, noise_candidates)
    for count in rows:
        sequence = cache.open([0] * count, count + 1)
        batch = RaggedBatch.build([(sequence, [0] * count, 0)])
        hidden = [model.forward(batch, cache).hidden for _ in range(3)][-1]
        for sampling in (Sampling(temperature=0.0), Sampling(seed=1)):
            judged(hidden[-1:], [Candidate(sampling, 0, count)])
        cache.close(sequence)
