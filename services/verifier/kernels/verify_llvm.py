"""`services.verifier.verification.verify` by code compiled for the processor: a request's whole walk is one task.

Requests with filters or log-probabilities, and rules that are not exact, are the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from dspark.errors import InternalError
from dspark.kernels import team
from dspark.kernels.logits import BLOCK
from dspark.kernels.noise import signed_seed
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.sampling.drafted import certain
from dspark.sampling.scratch import scratch
from services.verifier import verification
from services.verifier.candidates import Candidate, Outcome, refused
from services.verifier.kernels.judge_llvm import (
    BOUNDED_COUPLED,
    BOUNDED_GREEDY,
    COUPLED,
    GREEDY,
    REJECTION,
    compiled,
)
from services.verifier.kernels.walk_llvm import JudgeArguments, room_sizes
from services.verifier.race import high_blocks
from services.verifier.verification import EXACT, AcceptanceRules

__all__ = ["Table", "unsound", "verify", "walk"]

_ALIGNED = 64
_DTYPES = torch.float32, torch.bfloat16
_BOUNDED = {GREEDY: BOUNDED_GREEDY, COUPLED: BOUNDED_COUPLED}


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """What logits are made of whose bounds are known: rows (any, d) and weights (vocabulary, d), both bfloat16.

    `peaks` (any, width / PEAKED) float32: the greatest of every so many bounds.
    """

    states: torch.Tensor
    weights: torch.Tensor
    peaks: torch.Tensor

    @property
    def places(self) -> tuple[int, ...]:
        """Addresses of both, pairs of numbers in a row, then where peaks lie and how far rows of them are apart."""
        assert self.states.dtype == self.weights.dtype == torch.bfloat16
        assert self.states.is_contiguous()
        assert self.weights.is_contiguous()
        assert self.peaks.dtype == torch.float32
        assert self.peaks.stride(1) == 1
        pairs = self.weights.shape[1] // 2
        return self.states.data_ptr(), self.weights.data_ptr(), pairs, self.peaks.data_ptr(), self.peaks.stride(0)


@torch.inference_mode()
def verify(
    logits: torch.Tensor,
    requests: Sequence[Candidate],
    *,
    noise_candidates: int = 256,
    rules: AcceptanceRules = EXACT,
    reference: Callable[..., list[Outcome]] = verification.verify,
) -> list[Outcome]:
    """As `verification.verify`; `reference`, the same with its own kernels, takes what is left to it."""
    own = partial(reference, noise_candidates=noise_candidates, rules=rules)
    if rules is not EXACT or logits.dtype not in _DTYPES:
        return own(logits, requests)
    simple = [_simple(request.sampling) for request in requests]
    judged = iter(_judged(logits, [r for r, mine in zip(requests, simple, strict=True) if mine], noise_candidates))
    others = iter(own(logits, [r for r, mine in zip(requests, simple, strict=True) if not mine]))
    return [next(judged if mine else others) for mine in simple]


def _simple(sampling: Sampling) -> bool:
    return sampling.logprobs is None and (sampling.greedy or not sampling.filtered)


def _judged(logits: torch.Tensor, requests: Sequence[Candidate], most: int) -> list[Outcome]:
    outcomes = [refused(request, *logits.shape) for request in requests]
    sound = [request for request, outcome in zip(requests, outcomes, strict=True) if outcome is None]
    walked = iter(walk(logits, sound, most) if sound else ())
    return [_outcome(r, *next(walked)) if o is None else o for r, o in zip(requests, outcomes, strict=True)]


def _outcome(request: Candidate, accepted: int, token: int, sound: int) -> Outcome:
    if sound:
        return Outcome(accepted, token)
    return Outcome(0, -1, error=unsound(request.position + accepted))


def unsound(position: int) -> InternalError:
    """Why nothing is chosen there."""
    return InternalError(f"the target's logits for position {position} are not finite")


def walk(logits: torch.Tensor, requests: Sequence[Candidate], most: int, table: Table | None = None) -> list[list[int]]:
    """Of each request: draft tokens that stand, the token behind them, and whether the logits were sound.

    With a table, `logits` are bounds, and the last may be `race_llvm.UNDECIDED`.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if missing := -logits.shape[1] % BLOCK:
        logits = functional.pad(logits, (0, missing), value=-torch.inf)
    blocks, most = logits.shape[1] // BLOCK, min(most, logits.shape[1])
    threads = torch.get_num_threads() if len(requests) > 1 else 1  # a team's threads each take a room
    rooms, piece = _rooms(blocks, most, threads)
    own = _tables(requests, bounded=table is not None)
    out = torch.empty(len(requests), 3, dtype=torch.int64)
    high = blocks if table is None else high_blocks(blocks, most)
    arguments = JudgeArguments(
        logits.data_ptr(), logits.stride(0), blocks, most, high, *(table.data_ptr() for table in own), out.data_ptr(),
        *(table.places if table else (0,) * 5), *rooms, piece, 0, len(requests), 0,
    )  # fmt: skip
    run = team.alone if threads == 1 else team.run
    run(compiled(narrow=logits.dtype == torch.bfloat16), arguments)
    found: list[list[int]] = out.tolist()
    return found


def _tables(requests: Sequence[Candidate], *, bounded: bool) -> tuple[torch.Tensor, ...]:
    """Requests, temperatures, draft tokens, and what these were drawn from, as `JudgeArguments` has them."""
    counts = [len(request.draft_tokens) for request in requests]
    firsts = accumulate(counts, initial=0)
    rows = [
        (
            _BOUNDED[_kind(r.sampling)] if bounded else _kind(r.sampling),
            r.first_row,
            first,
            count,
            r.position,
            signed_seed(r.sampling.seed),
        )
        for r, first, count in zip(requests, firsts, counts, strict=False)
    ]
    temperatures = [request.sampling.temperature or 1.0 for request in requests]
    supports = [_support(request, at) for request in requests for at in range(len(request.draft_tokens))]
    begins = list(accumulate((len(support.token_ids) for support in supports), initial=0))
    totals = [sum(support.probabilities) for support in supports]
    drafts = [token for request in requests for token in request.draft_tokens]
    known = [dict(zip(support.token_ids, support.probabilities, strict=True)) for support in supports]
    owns = [q.get(token, 0.0) / (total or 1.0) for token, q, total in zip(drafts, known, totals, strict=True)]
    return (
        _integers(rows),
        _doubles(temperatures),
        _integers(drafts),
        _integers(begins),
        _integers([token for support in supports for token in support.token_ids]),
        _doubles([p / total for s, total in zip(supports, totals, strict=True) for p in s.probabilities]),
        _doubles(owns),
    )


def _doubles(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _integers(values: Sequence[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _kind(sampling: Sampling) -> int:
    if sampling.greedy:
        return GREEDY
    return REJECTION if sampling.mode is Mode.REJECTION else COUPLED


_NOTHING = SparseDistribution((), ())


def _support(request: Candidate, at: int) -> SparseDistribution:
    """What a draft token was drawn from, where that is looked at."""
    if _kind(request.sampling) != REJECTION:
        return _NOTHING
    known = request.draft_distributions
    sparse = known[at] if known else None
    return sparse if sparse and sparse.token_ids else certain(request.draft_tokens[at])


def _rooms(blocks: int, most: int, threads: int) -> tuple[list[int], int]:
    """Where the parts of the first thread's room lie, and how far the next thread's is."""
    sizes = [-(-size // _ALIGNED) * _ALIGNED for size in room_sizes(blocks, most).values()]
    piece = sum(sizes)
    whole = scratch.take("judged", threads, piece // 4, torch.device("cpu"))
    return [whole.data_ptr() + before for before in accumulate(sizes[:-1], initial=0)], piece
