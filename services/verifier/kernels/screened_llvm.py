"""Verdicts where a head's logits are bounded first: by bounds where these will do, by whole rows of logits elsewhere.

Greedy and coupled requests without filters go by bounds (`services.verifier.race`). Blocks by rejection, and filters,
weigh all tokens: their rows' logits are computed, and judged as anywhere else. So are those of a row that bounds leave
undecided, and of rows whose log-probabilities are asked for, which changes no token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from dspark.kernels.logits import LogitKernels
from dspark.kernels.screen import PEAKED, Screen
from dspark.messages import Mode, PositionLogprobs, Sampling
from dspark.sampling.logprobs import logprobs
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import process
from dspark.sampling.rows import UNFILTERED, SamplingRows
from dspark.sampling.scratch import scratch
from services.verifier.candidates import Candidate, Outcome, refused, with_alternatives
from services.verifier.kernels.race_llvm import UNDECIDED
from services.verifier.kernels.verify_llvm import Table, unsound
from services.verifier.kernels.verify_llvm import walk as race

__all__ = ["verify"]

Whole = Callable[[Sequence[int]], torch.Tensor]
"""Logits of some rows."""
Judge = Callable[..., list[Outcome]]


@torch.inference_mode()
def verify(
    hidden: torch.Tensor,
    requests: Sequence[Candidate],
    *,
    screen: Screen,
    whole: Whole,
    noise_candidates: int,
    by_logits: Judge,
    passes: LogitKernels,
) -> list[Outcome]:
    """As `services.verifier.verification.verify`, from rows (any, d) float32 after the final norm.

    `whole` gives logits of some of them, `by_logits` judges by logits.
    """
    outcomes = [refused(request, len(hidden), len(screen.table)) for request in requests]
    left = [index for index, outcome in enumerate(outcomes) if outcome is None]
    court = _Court(hidden, screen, whole, noise_candidates, by_logits, passes)
    for judge, bounded in ((court.by_bounds, True), (court.by_whole, False)):
        mine = [index for index in left if _bounded(requests[index].sampling) is bounded]
        for index, outcome in zip(mine, judge([requests[index] for index in mine]), strict=True):
            outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _bounded(sampling: Sampling) -> bool:
    return sampling.greedy or not (sampling.filtered or sampling.mode is Mode.REJECTION)


class _Court:
    """What stays the same during a call."""

    def __init__(
        self,
        hidden: torch.Tensor,
        screen: Screen,
        whole: Whole,
        noise_candidates: int,
        by_logits: Judge,
        passes: LogitKernels,
    ) -> None:
        self._hidden, self._screen, self._whole = hidden, screen, whole
        self._size, self._by_logits, self._passes = noise_candidates, by_logits, passes

    def by_whole(self, requests: Sequence[Candidate]) -> list[Outcome]:
        """By logits of all their rows."""
        if not requests:
            return []
        rows, moved = _apart(requests)
        by = partial(self._by_logits, self._whole(rows), noise_candidates=self._size)
        return with_alternatives(by, moved)

    def by_bounds(self, requests: Sequence[Candidate]) -> list[Outcome]:
        """By bounds on theirs."""
        if not requests:
            return []
        hidden = self._hidden
        rows, moved = _apart(requests)
        states = hidden if rows == list(range(len(hidden))) else hidden[torch.tensor(rows)]
        bounds = scratch.take("bounds", len(rows), self._screen.width, hidden.device)
        peaks = scratch.take("peaks", len(rows), self._screen.width // PEAKED, hidden.device)
        bounds = self._screen.above(states, bounds, peaks)
        table = Table(states.bfloat16(), self._screen.table, peaks)
        return with_alternatives(partial(self._raced, bounds, table, rows), moved)

    def _raced(
        self, bounds: torch.Tensor, table: Table, rows: Sequence[int], requests: Sequence[Candidate]
    ) -> list[Outcome]:
        """By bounds that are there, of `rows`."""
        walks = [_Walk(request) for request in requests]
        while going := [walk for walk in walks if walk.result is None]:
            found = race(bounds, [walk.left() for walk in going], self._size, table)
            for walk, result in zip(going, found, strict=True):
                walk.advance(*result)
            self._decide([walk for walk in walks if walk.undecided], rows)
        outcomes = [walk.result for walk in walks if walk.result is not None]
        return self._reported(requests, outcomes, rows)

    def _decide(self, walks: Sequence[_Walk], rows: Sequence[int]) -> None:
        """Tokens of rows that bounds leave undecided, by their logits."""
        if not walks:
            return
        logits = self._whole([rows[walk.row] for walk in walks])
        asked = [Candidate(walk.sampling, place, walk.position) for place, walk in enumerate(walks)]
        for walk, outcome in zip(walks, self._by_logits(logits, asked, noise_candidates=self._size), strict=True):
            walk.decide(outcome)

    def _reported(
        self, requests: Sequence[Candidate], outcomes: Sequence[Outcome], rows: Sequence[int]
    ) -> list[Outcome]:
        """With log-probabilities, where they are asked for; logits of all their rows are computed at once."""
        asked = [
            (index, request, (*request.draft_tokens[: outcome.accepted], outcome.token))
            for index, (request, outcome) in enumerate(zip(requests, outcomes, strict=True))
            if request.sampling.logprobs is not None and outcome.error is None
        ]
        if not asked:
            return list(outcomes)
        whole = [rows[request.first_row + at] for _, request, tokens in asked for at in range(len(tokens))]
        logits, reported, row = self._whole(whole), list(outcomes), itertools.count()
        for index, request, tokens in asked:
            reports = tuple(self._report(logits, next(row), token, request.sampling) for token in tokens)
            reported[index] = replace(reported[index], logprobs=reports)
        return reported

    def _report(self, logits: torch.Tensor, row: int, token: int, sampling: Sampling) -> PositionLogprobs:
        own = LogitRows.of(logits, [row], self._passes)
        law = SamplingRows.of([UNFILTERED if sampling.greedy else sampling], logits.device)
        return logprobs(process(own, law, self._size), own, 0, token, sampling.logprobs or 0)


class _Walk:
    """A request on its way along its rows: `behind` drafts stand."""

    def __init__(self, request: Candidate) -> None:
        self._request = request
        self.sampling = replace(request.sampling, logprobs=None)
        self.behind, self.undecided = 0, False
        self.result: Outcome | None = None

    @property
    def row(self) -> int:
        """Whose logits decide what follows."""
        return self._request.first_row + self.behind

    @property
    def position(self) -> int:
        """Of the token that follows."""
        return self._request.position + self.behind

    def left(self) -> Candidate:
        """What is ahead."""
        return Candidate(self.sampling, self.row, self.position, self._request.draft_tokens[self.behind :])

    def advance(self, accepted: int, token: int, sound: int) -> None:
        """Go on by what bounds have found."""
        self.behind += accepted
        self.undecided = sound == UNDECIDED
        if not sound:
            self.decide(Outcome(0, -1, error=unsound(self.position)))
        elif not self.undecided:
            self.result = Outcome(self.behind, token)

    def decide(self, outcome: Outcome) -> None:
        """Go on by what logits have found at this row."""
        drafts, self.undecided = self._request.draft_tokens, False
        if outcome.error is None and drafts[self.behind : self.behind + 1] == (outcome.token,):
            self.behind += 1
        else:
            self.result = outcome if outcome.error else Outcome(self.behind, outcome.token)


def _apart(requests: Sequence[Candidate]) -> tuple[list[int], list[Candidate]]:
    """The rows of some requests, and these as if there were no other rows."""
    rows: list[int] = []
    moved = []
    for request in requests:
        moved.append(replace(request, first_row=len(rows)))
        rows += range(request.first_row, request.first_row + request.rows)
    return rows, moved
