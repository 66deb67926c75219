"""The verify engine: opens sequences, runs steps, serves taps and features. Synchronous, for one thread.

A step is one ragged forward over prompt pieces and draft prefixes together (`step.py`); what it commits is decided in
`verification.py`. Transport, queueing and logs are other modules' business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from dspark.costs import Refined
from dspark.errors import (
    DSparkError,
    InvalidRequest,
    OutOfPages,
    StaleMessage,
    Unavailable,
    UnknownSequence,
)
from dspark.messages import (
    ModelInfo,
    Opened,
    OpenSequence,
    SequenceKey,
    StepItem,
    StepResult,
    TapInfo,
    Verdict,
    WorkerLoad,
)
from dspark.models.config import FULL
from dspark.models.kv_cache import CachedSequence, KVCache
from dspark.models.target import TargetModel
from services.verifier.backfill import Backfill
from services.verifier.features import FeatureStore
from services.verifier.feed import FeatureStream, Feed, flush, refused
from services.verifier.held import HeldStates
from services.verifier.metrics import Metrics
from services.verifier.sequences import Limits, SequenceState, Work, check_open, describe, plan, refusal, step_shape
from services.verifier.step import Computed, Stepper, split
from services.verifier.taps import Tap, check_info

__all__ = ["EngineSettings", "VerifyEngine"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an operator may choose."""

    max_step_tokens: int = 512  # rows of one forward
    noise_candidates: int = 256  # of coupled sampling; part of the numerics
    backfill_rows: int = 32  # of one background piece
    max_taps: int = 4  # feature buffers kept at once
    held_bytes: int = 128 << 20  # of hidden states whose features nobody has asked for yet


class VerifyEngine:
    """A target model with its K/V cache, open sequences, taps and feature subscriptions."""

    def __init__(
        self,
        model: TargetModel,
        cache: KVCache,
        settings: EngineSettings | None = None,
        *,
        info: ModelInfo | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """`info`: as the worker describes its model, by default the model's own."""
        self.settings = settings or EngineSettings()
        self.info = info or model.info
        self.metrics = metrics or Metrics()
        self.draining = False
        self.costs: Refined | None = None  # follows steps once it is there
        self._cache = cache
        self._kernels = model.kernels
        self._limits = Limits(self.info.vocab_size, self.info.max_context, self.settings.max_step_tokens)
        self._sequences: dict[str, SequenceState] = {}
        self._features = FeatureStore(
            pages=_page_ids(cache), page_size=cache.page_size, device=cache.device, max_taps=self.settings.max_taps
        )
        cache.on_evict(self._features.forget)
        self._stepper = Stepper(model, cache, self._features, noise_candidates=self.settings.noise_candidates)
        self._backfill = Backfill(model, cache, self._features, rows=self.settings.backfill_rows)
        self._feed = Feed(self._features, self._backfill.want)
        self._held = HeldStates(self._features, limit_bytes=self.settings.held_bytes, generation=cache.generation)
        self._holding = False
        self._load = WorkerLoad()
        self._note_load()

    # ------------------------------------------------------------ sequences

    def open(self, requests: Sequence[OpenSequence]) -> list[Opened]:
        """Reserve pages and take what the prefix cache has; each request fails alone."""
        self._queue(held=False)
        opened = [self._answer_open(request) for request in requests]
        self._feed.flush()
        self._note_load()
        return opened

    def close(self, keys: Iterable[SequenceKey]) -> None:
        """Free pages and end subscriptions. What is unknown or of another epoch is closed already: no error."""
        self._queue(held=False)
        found = {key: self._sequences.get(key.sequence_id) for key in keys}
        self._close([state for key, state in found.items() if state is not None and state.key == key])
        self._feed.flush()
        self._note_load()

    def step(self, items: Sequence[StepItem]) -> StepResult:
        """Compute, verify and commit. Features wait for `publish_due`, those of items that say so for later ones.

        Verdicts come in the order of the items. An item that cannot be served gets an error and hurts no other; of
        two items about one sequence the second is refused. Rows past max_step_tokens go into a further forward.
        """
        result, learn = self.compute(items)
        learn()
        return self._priced(result)

    def compute(self, items: Sequence[StepItem]) -> tuple[StepResult, Callable[[], None]]:
        """`step`, but for what is to be learned of it for counts and costs, which whoever waits need not wait for."""
        began = time.perf_counter()
        self.publish_due()()
        planned = self._plan(items)
        self._holding = bool(items) and all(item.hold_features for item in items)
        work = [entry for entry in planned if isinstance(entry, Work)]
        computed = [
            self._stepper.run(part) for part in split(work, self.settings.max_step_tokens, lambda own: own.rows)
        ]
        for part in computed:
            self._held.add(part)
        verdicts = self._collect(planned, computed)
        result = StepResult(
            verdicts,
            sum(part.forward_seconds for part in computed),
            sum(part.sample_seconds for part in computed),
            time.perf_counter() - began,
        )
        rows = sum(own.rows for own in work)
        if work:
            self._load = replace(self._load, tokens_in_flight=rows, step_seconds=result.total_seconds)
        told = [(own, verdict) for part in computed for own, verdict in zip(part.work, part.verdicts, strict=True)]
        shape = step_shape(computed[0].work) if len(computed) == 1 else None
        return self._priced(result), partial(self._learn, told, shape, result, rows)

    def saved(self, one: tuple[int, float], other: tuple[int, float]) -> float:
        """Seconds that a step of both takes less than one of each, rows and context; 0 where costs are not known.

        At most what the shorter of the two takes, whatever costs beyond what was measured say.
        """
        if self.costs is None:
            return 0.0
        (rows, context), (others, far) = one, other
        joined = self.costs.predict(rows + others, (rows * context + others * far) / max(1, rows + others))
        apart = self.costs.predict(rows, context), self.costs.predict(others, far)
        return min(max(0.0, sum(apart) - joined), *apart)

    def publish(self) -> None:
        """Compute features of all that was committed since, held or not, and send them to subscribers."""
        self._queue(held=True)
        self._feed.flush()

    def publish_due(self) -> Callable[[], None]:
        """`publish`, but for sequences whose features may wait: these are computed where no more states fit.

        Apart from `step`, whose verdicts go first. Its last part, in which subscribers are told, is returned; any
        thread may call it.
        """
        self._queue(held=False)
        self._held.make_room()
        if self._held.full:
            self._held.keep(self._held.states)
        return partial(flush, self._feed.filled())

    def _queue(self, *, held: bool) -> None:
        behind = [state for state in self._sequences.values() if state.offered_len < state.computed_len]
        due = [state for state in behind if held or not state.held]
        self._held.keep([*due, *self._sharing(due)])
        for state in due:
            state.offered_len = state.computed_len
            self._feed.push(state)

    def _sharing(self, due: Iterable[SequenceState]) -> list[SequenceState]:
        """Others, held or closed, who computed what these found in the prefix cache and have not offered yet."""
        fresh = [state for state in due if state.request.features and state.offered_len < state.reused_len]
        found = [state.cached.full_pages[: state.reused_len // self._cache.page_size] for state in fresh]
        return self._held.having([page for pages in found for page in pages])

    def find(self, key: SequenceKey) -> SequenceState:
        """An open sequence. `UnknownSequence`, or `StaleMessage` for another epoch."""
        state = self._sequences.get(key.sequence_id)
        if state is None:
            raise UnknownSequence(f"{describe(key)} is not open here")
        if state.key.epoch != key.epoch:
            raise StaleMessage(f"{describe(key)}: the sequence is at epoch {state.key.epoch}")
        return state

    def load(self) -> WorkerLoad:
        """What the worker is doing; any thread may ask."""
        return replace(self._load, draining=self.draining)

    # ------------------------------------------------------------ features

    @property
    def tap_ids(self) -> tuple[str, ...]:
        """Registered taps."""
        return self._features.tap_ids

    def register_tap(self, info: TapInfo, tensors: Mapping[str, Tensor]) -> None:
        """Compute this tap's features from now on; a known tap stays. `Mismatch`, `InvalidRequest`, `Overloaded`."""
        self.publish()
        check_info(info, self.info)
        tap = Tap(info, tensors, self._kernels, self._cache.device)
        fresh = info.tap_id not in self.tap_ids
        self._features.add(tap, in_use=self._feed.taps_in_use)
        if fresh:
            self._held.drop_closed()  # which may lack the tap's layers
        if fresh and not self._sequences:  # nobody waits
            self._stepper.rehearse()

    def subscribe(self, stream: FeatureStream, key: SequenceKey, tap_id: str, position: int) -> None:
        """Send a sequence's features from a position on, held ones later; what is wrong is sent to the stream."""
        self._queue(held=False)
        try:
            self._feed.subscribe(stream, self.find(key), tap_id, position)
        except DSparkError as error:
            stream.put(refused(key, error, position))
            stream.flush()

    def unsubscribe(self, stream: FeatureStream, key: SequenceKey) -> None:
        """Stop sending a sequence's features to the stream. Of another epoch nothing is sent."""
        state = self._sequences.get(key.sequence_id)
        if state is None or state.key == key:
            self._feed.unsubscribe(stream, key)

    def resume(self, stream: FeatureStream) -> None:
        """The stream has room again: go on where it was left behind."""
        self._queue(held=False)
        for sequence_id in self._feed.followed(stream):
            self._feed.push(self._sequences[sequence_id])
        self._feed.flush()

    def leave(self, stream: FeatureStream) -> None:
        """The stream has ended."""
        for sequence_id in self._feed.followed(stream):
            self._feed.unsubscribe(stream, self._sequences[sequence_id].key)

    @property
    def has_background_work(self) -> bool:
        """Whether `run_background` would do something."""
        return self._backfill.ready

    def run_background(self) -> None:
        """One bounded piece of recomputing missing features."""
        self._queue(held=False)
        finished = self._backfill.run_piece()
        if finished is not None:
            self.metrics.recomputed.inc(finished.end)
            self._feed.push(finished.state)
        self._feed.flush()
        self._note_load()

    # ------------------------------------------------------------ inside

    def _answer_open(self, request: OpenSequence) -> Opened:
        try:
            return Opened(request.key, self._open(request).computed_len)
        except DSparkError as error:
            self.metrics.refused.labels(type(error).__name__).inc()
            return Opened(request.key, error=error)

    def _open(self, request: OpenSequence) -> SequenceState:
        check_open(request, self._limits)
        present = self._sequences.get(request.key.sequence_id)
        if present is not None and present.request == request and present.answered is None:
            return present  # a repeat
        if present is not None and present.key.epoch >= request.key.epoch:
            raise StaleMessage(f"{describe(request.key)}: the sequence is at epoch {present.key.epoch}")
        if self.draining:
            raise Unavailable("this worker is draining and opens nothing new")
        if present is not None:
            self._close([present])
        cached = self._reserve(request)
        reused = cached.computed_len
        state = SequenceState(request, cached, list(request.token_ids), reused, reused, held=self._holding)
        self._sequences[request.key.sequence_id] = state
        self.metrics.prefix_queries.inc(state.committed_len)
        self.metrics.prefix_hits.inc(state.computed_len)
        return state

    def _reserve(self, request: OpenSequence) -> CachedSequence:
        try:
            return self._cache.open(request.token_ids, request.max_len)
        except OutOfPages:
            if not self._backfill.yield_pages():
                raise
            return self._cache.open(request.token_ids, request.max_len)

    def _close(self, states: Collection[SequenceState]) -> None:
        if self._cache.shares_prefixes:
            self._held.retire(states)
        else:
            self._held.drop(states)
        for state in states:
            del self._sequences[state.key.sequence_id]
            self._feed.end(state)
            self._cache.close(state.cached)
            self._backfill.cancel(state)

    def _plan(self, items: Sequence[StepItem]) -> list[Work | Verdict]:
        seen: set[str] = set()
        planned: list[Work | Verdict] = []
        for item in items:
            try:
                if item.key.sequence_id in seen:
                    raise InvalidRequest(f"{describe(item.key)}: a second item about one sequence in one step")
                seen.add(item.key.sequence_id)
                state = self.find(item.key)
                planned.append(plan(item, state, self._limits))
                state.held = item.hold_features
            except DSparkError as error:
                self.metrics.refused.labels(type(error).__name__).inc()
                planned.append(refusal(item, error))
        return planned

    @staticmethod
    def _collect(planned: Sequence[Work | Verdict], computed: Sequence[Computed]) -> tuple[Verdict, ...]:
        """Every item's verdict: the computed ones come in the order of their work."""
        fresh = iter([verdict for part in computed for verdict in part.verdicts])
        return tuple(next(fresh) if isinstance(entry, Work) else entry for entry in planned)

    def _learn(
        self,
        told: Sequence[tuple[Work, Verdict]],
        shape: tuple[int, float] | None,
        result: StepResult,
        rows: int,
    ) -> None:
        """Count the step, and let the costs follow it where it was one forward of a shape that they know."""
        for work, verdict in told:
            self.metrics.committed(work, verdict)
        if told:
            self.metrics.stepped(result, rows)
        if self.costs is None:
            return
        if shape is not None:
            self.costs.observe(*shape, result.total_seconds)
        self._load = replace(self._load, observed_ratio=self.costs.ratio)
        self._priced(result)  # what takes its time is done now, and the next step's reply finds it done

    def _priced(self, result: StepResult) -> StepResult:
        """With what the costs come to."""
        if self.costs is None:
            return result
        return replace(result, fixed_seconds=self.costs.fixed_seconds, marginal_seconds=self.costs.marginal_seconds)

    def _note_load(self) -> None:
        self._load = replace(
            self._load,
            running=len(self._sequences),
            free_pages=self._cache.free_pages + self._backfill.held_pages,
            total_pages=self._cache.total_pages,
        )


def _page_ids(cache: KVCache) -> int:
    """Ids of full-attention pages are below this."""
    return int(cache.layer(cache.config.layer_types.index(FULL)).shape[1])
