"""What is judged and what comes of it: draft tokens of one request, and which of them stand. Judges nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.errors import DSparkError, InternalError, InvalidRequest
from dspark.messages import Mode, PositionLogprobs, Sampling, SparseDistribution
from dspark.sampling.drafted import flaw

__all__ = ["Candidate", "Outcome", "refused"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """Draft tokens of one request and where their target logits lie.

    Rows `first_row` … `first_row + len(draft_tokens)` of the logits are the request's: row i decides the token at
    `position + i`, `position` being the committed length N. `draft_distributions` (rejection mode) has one entry per
    draft token or none at all; an empty entry, or none, means that the token was proposed with certainty.
    """

    sampling: Sampling
    first_row: int
    position: int
    draft_tokens: tuple[int, ...] = ()
    draft_distributions: tuple[SparseDistribution, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many draft tokens stand, and the target's token after them.

    `logprobs` has `accepted + 1` entries when asked for (`dspark.sampling.logprobs`). With `error` set the rest means
    nothing: the request was refused, or its logits are broken; other requests of the call are not affected.
    """

    accepted: int
    token: int
    logprobs: tuple[PositionLogprobs, ...] = ()
    error: DSparkError | None = None


def refused(request: Candidate, rows: int, vocab: int) -> Outcome | None:
    """The outcome of a request that cannot be judged, else None. `InternalError` for rows that are not there."""
    drafts = request.draft_tokens
    if request.first_row < 0 or request.first_row + len(drafts) >= rows:
        raise InternalError(f"rows {request.first_row} to {request.first_row + len(drafts)} of {rows} logits")
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
