"""What the verifier remembers of an open sequence, and which messages about it are served. Knows no tensors.

A sequence has N committed tokens, of which the last is the anchor, and K/V for `computed_len` positions. A step item
computes `count` of the missing committed positions; when these reach the anchor, its draft tokens follow in the same
forward, and the rows from the anchor on choose what is committed next. N then grows by accepted + 1, and by one more
where an alternative was taken; a rejected draft needs no undoing: the next rows overwrite its K/V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspark.errors import DSparkError, InternalError, InvalidRequest, StaleMessage
from dspark.messages import (
    Alternative,
    Mode,
    OpenSequence,
    Sampling,
    SequenceKey,
    SparseDistribution,
    StepItem,
    Verdict,
)
from dspark.models.kv_cache import CachedSequence
from services.verifier.candidates import Outcome

__all__ = ["Limits", "SequenceState", "Work", "check_open", "describe", "plan", "refusal", "step_shape"]

MAX_LOGPROBS = 100
_JUDGED = 0.75  # of a step's rows, at least, for its time to say something


@dataclass(frozen=True, slots=True)
class Limits:
    """What this worker's model and settings allow."""

    vocab_size: int
    max_context: int
    max_step_tokens: int


@dataclass(slots=True, eq=False)
class SequenceState:
    """One open sequence: committed ids (anchor last), K/V pages, and the answer to its last step."""

    request: OpenSequence
    cached: CachedSequence
    token_ids: list[int]
    computed_len: int
    reused_len: int  # positions whose K/V came from the prefix cache
    answered: Verdict | None = None
    held: bool = False  # readers need not have what is new
    offered_len: int = 0  # positions of which they may have it

    @property
    def key(self) -> SequenceKey:
        """Sequence and epoch."""
        return self.request.key

    @property
    def committed_len(self) -> int:
        """N: prompt and emitted tokens, the anchor included."""
        return len(self.token_ids)

    def extend(self, work: Work, outcome: Outcome) -> Verdict:
        """Commit the drafts that stand, as far as the item keeps them, and what comes after them.

        The verdict is kept for a repeat.
        """
        before, matched = self.committed_len, outcome.accepted
        accepted = min(matched, work.keep)
        token = work.draft_tokens[accepted] if accepted < matched else outcome.token
        turned = [work.alternative(accepted + 1)[1]] if outcome.turned else []
        self.token_ids += [*work.draft_tokens[:accepted], *turned, token]
        self.computed_len = self.committed_len - 1
        logprobs = outcome.logprobs[: self.committed_len - before]
        told = self.key, before, self.computed_len, accepted, token, logprobs
        self.answered = Verdict(*told, matched=matched, turned=outcome.turned, alternatives=len(work.alternatives))
        return self.answered

    def refuse(self, error: DSparkError) -> Verdict:
        """Nothing came of the work; the sequence is as it was."""
        return Verdict(self.key, self.committed_len, self.computed_len, error=error)

    def advance(self, work: Work) -> Verdict:
        """Count a prompt piece as computed."""
        self.computed_len = work.start + work.count
        return Verdict(self.key, self.committed_len, self.computed_len)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The rows of one admitted item: positions start … start + count - 1, then drafts, then alternatives."""

    state: SequenceState
    start: int
    count: int
    reaches_anchor: bool  # so a token is chosen
    draft_tokens: tuple[int, ...] = ()
    draft_distributions: tuple[SparseDistribution, ...] = ()
    keep: int = 0  # drafts that may be committed
    alternatives: tuple[Alternative, ...] = ()

    @property
    def rows(self) -> int:
        """Rows in the forward."""
        return self.count + len(self.draft_tokens) + len(self.alternatives)

    def alternative(self, place: int) -> tuple[int, int]:
        """Which of the item's rows has the alternative for a place, and its token."""
        for row, one in enumerate(self.alternatives, self.count + len(self.draft_tokens)):
            if one.place == place:
                return row, one.token
        raise InternalError(f"{describe(self.state.key)}: no alternative for place {place}")

    @property
    def row_ids(self) -> list[int]:
        """Input token of each row but those of alternatives."""
        return [*self.state.token_ids[self.start : self.start + self.count], *self.draft_tokens]


def step_shape(work: Sequence[Work]) -> tuple[int, float] | None:
    """A step's rows and its sequences' mean context, by which its time is learned; None where it teaches nothing.

    Rows inside a prompt go through the layers but not through the head: a step of mostly such rows is no measure of
    what verifying as many costs.
    """
    rows = sum(own.rows for own in work)
    judged = sum(1 + own.rows - own.count for own in work if own.reaches_anchor)
    if not rows or judged < _JUDGED * rows:
        return None
    return rows, sum(own.start + own.count for own in work) / len(work)


def describe(key: SequenceKey) -> str:
    """A sequence as messages name it."""
    return f"sequence {key.sequence_id!r} epoch {key.epoch}"


def refusal(item: StepItem, error: DSparkError) -> Verdict:
    """The verdict of an item that is not served."""
    return Verdict(item.key, item.committed_len, error=error)


# ---------------------------------------------------------------- opening


def check_open(request: OpenSequence, limits: Limits) -> None:
    """`InvalidRequest` unless the ids, lengths and sampling settings are ones this model can serve."""
    length = len(request.token_ids)
    if not request.key.sequence_id:
        raise InvalidRequest("sequence_id is empty")
    if not length:
        raise InvalidRequest("token_ids is empty: a sequence starts with at least one token")
    if request.max_len > limits.max_context:
        raise InvalidRequest(f"max_len {request.max_len} is over the model's context of {limits.max_context} tokens")
    if length >= request.max_len:
        raise InvalidRequest(f"token_ids holds {length} tokens, which leaves no room within max_len {request.max_len}")
    _check_ids("token_ids", request.token_ids, limits.vocab_size)
    _check_sampling(request.sampling)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{field}: token id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}")


def _check_sampling(sampling: Sampling) -> None:
    if not 0.0 <= sampling.temperature < math.inf:
        raise InvalidRequest(f"sampling.temperature {sampling.temperature} is not a finite number of at least 0")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(f"sampling.top_p {sampling.top_p} is outside (0, 1]")
    if not 0.0 <= sampling.min_p < 1.0:
        raise InvalidRequest(f"sampling.min_p {sampling.min_p} is outside [0, 1)")
    if sampling.logprobs is not None and sampling.logprobs > MAX_LOGPROBS:
        raise InvalidRequest(f"sampling.logprobs {sampling.logprobs} is over the limit of {MAX_LOGPROBS}")


# ---------------------------------------------------------------- stepping


def plan(item: StepItem, state: SequenceState, limits: Limits) -> Work | Verdict:
    """The rows that the item asks for, or the stored verdict if it repeats the last step.

    Drafts that could not be committed within max_len are dropped. Raises `StaleMessage` and `InvalidRequest`.
    """
    if item.key.epoch != state.key.epoch:
        raise StaleMessage(f"{describe(item.key)}: the sequence is at epoch {state.key.epoch}")
    if item.committed_len != state.committed_len:
        return _repeat(item, state)
    work = _clip(item, state)
    _check_count(work, limits)
    _check_ids("draft_tokens", work.draft_tokens, limits.vocab_size)
    _check_alternatives(item, state.request.sampling, limits)
    return work


def _repeat(item: StepItem, state: SequenceState) -> Verdict:
    if state.answered is not None and state.answered.committed_len == item.committed_len:
        return state.answered
    raise StaleMessage(f"{describe(item.key)}: committed_len {item.committed_len}, here {state.committed_len}")


def _clip(item: StepItem, state: SequenceState) -> Work:
    room = state.request.max_len - state.committed_len - 1  # one place is the chosen token's
    if room < 0:
        raise InvalidRequest(f"{describe(item.key)}: all of max_len {state.request.max_len} is committed")
    drafts = item.draft_tokens[:room]
    anchored = state.computed_len + item.count == state.committed_len
    keep = len(drafts) if item.keep is None else min(len(drafts), item.keep)
    others = tuple(alternative for alternative in item.alternatives if alternative.place <= len(drafts))
    distributions = item.draft_distributions[: len(drafts)]
    return Work(state, state.computed_len, item.count, anchored, drafts, distributions, keep, others)


def _check_alternatives(item: StepItem, sampling: Sampling, limits: Limits) -> None:
    places = [alternative.place for alternative in item.alternatives]
    if not places:
        return
    if places != sorted(set(places)) or not 1 <= places[0] <= places[-1] <= len(item.draft_tokens):
        raise InvalidRequest(
            f"{describe(item.key)}: alternatives for places {places} of {len(item.draft_tokens)} drafts"
        )
    if item.keep is not None or (sampling.mode is Mode.REJECTION and not sampling.greedy):
        raise InvalidRequest(f"{describe(item.key)}: alternatives are not for rejection mode, nor for `keep`")
    _check_ids("alternatives", [alternative.token for alternative in item.alternatives], limits.vocab_size)


def _check_count(work: Work, limits: Limits) -> None:
    missing = work.state.committed_len - work.start
    if not 1 <= work.count <= missing:
        raise InvalidRequest(f"{describe(work.state.key)}: count {work.count} is outside 1 to {missing}")
    if work.draft_tokens and not work.reaches_anchor:
        raise InvalidRequest(f"{describe(work.state.key)}: draft_tokens with count {work.count} of {missing} positions")
    if work.rows > limits.max_step_tokens:
        raise InvalidRequest(
            f"{describe(work.state.key)}: {work.rows} tokens in one item, max_step_tokens is {limits.max_step_tokens}"
        )
