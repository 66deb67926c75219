"""What is judged and what comes of it: draft tokens of one request, and which of them stand. Judges nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dspark.errors import DSparkError, InternalError, InvalidRequest
from dspark.messages import Alternative, Mode, PositionLogprobs, Sampling, SparseDistribution
from dspark.sampling.drafted import flaw

__all__ = ["Candidate", "Judge", "Outcome", "refused", "with_alternatives"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Draft tokens of one request and where their target logits lie.

    Rows `first_row` … `first_row + len(draft_tokens)` of the logits are the request's: row i decides the token at
    `position + i`, `position` being the committed length N. `draft_distributions` (rejection mode) has one entry per
    draft token or none at all; an empty entry, or none, means that the token was proposed with certainty. Rows of
    `alternatives` follow, in their order: each decides the token behind one.
    """

    sampling: Sampling
    first_row: int
    position: int
    draft_tokens: tuple[int, ...] = ()
    draft_distributions: tuple[SparseDistribution, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    @property
    def rows(self) -> int:
        """Of the logits."""
        return 1 + len(self.draft_tokens) + len(self.alternatives)

    def turn(self, outcome: Outcome) -> Candidate | None:
        """What is left to judge where the target took an alternative to the first draft that does not stand."""
        if outcome.error is None:
            for row, one in enumerate(self.alternatives, self.first_row + 1 + len(self.draft_tokens)):
                if (one.place, one.token) == (outcome.accepted + 1, outcome.token):
                    return Candidate(self.sampling, row, self.position + one.place)
        return None


Judge = Callable[[Sequence[Candidate]], "list[Outcome]"]
"""Says which drafts stand; nothing of alternatives."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many draft tokens stand, and the target's token after them.

    `turned`: the token after them is an alternative, and `token` the one after that.

    `logprobs` has an entry for each of these tokens when asked for (`dspark.sampling.logprobs`). With `error` set the
    rest means nothing: the request was refused, or its logits are broken; other requests of the call are not affected.
    """

    accepted: int
    token: int
    logprobs: tuple[PositionLogprobs, ...] = ()
    error: DSparkError | None = None
    turned: bool = False


def with_alternatives(judge: Judge, requests: Sequence[Candidate]) -> list[Outcome]:
    """Outcomes that go on behind alternatives. Where that row's logits are broken it is as if there had been none."""
    outcomes = judge(requests)
    turns = [(index, request.turn(outcomes[index])) for index, request in enumerate(requests) if request.alternatives]
    further = [(index, turn) for index, turn in turns if turn is not None]
    if further:
        for (index, _), found in zip(further, judge([turn for _, turn in further]), strict=True):
            if found.error is None:
                before = outcomes[index]
                logprobs = before.logprobs + found.logprobs
                outcomes[index] = replace(before, token=found.token, logprobs=logprobs, turned=True)
    return outcomes


def refused(request: Candidate, rows: int, vocab: int) -> Outcome | None:
    """The outcome of a request that cannot be judged, else None. `InternalError` for rows that are not there."""
    end = request.first_row + request.rows
    if request.first_row < 0 or end > rows:
        raise InternalError(f"rows {request.first_row} to {end - 1} of {rows} logits")
    problem = _problem(request, vocab)
    return Outcome(0, -1, error=InvalidRequest(problem)) if problem else None


def _problem(request: Candidate, vocab: int) -> str | None:
    drafts = request.draft_tokens
    for token in drafts:
        if not 0 <= token < vocab:
            return f"draft_tokens: {token} is outside the vocabulary of {vocab}"
    if request.sampling.greedy or request.sampling.mode is not Mode.REJECTION or not request.draft_distributions:
        return None
    if len(request.draft_distributions) != len(drafts):
        return f"draft_distributions: {len(request.draft_distributions)} for {len(drafts)} draft tokens"
    flaws = (flaw(q, x, vocab) for q, x in zip(request.draft_distributions, drafts, strict=True) if q.token_ids)
    return next((f"draft_distributions: {found}" for found in flaws if found), None)
