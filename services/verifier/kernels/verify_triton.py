"""`services.verifier.verification.verify` by Triton kernels: no row of logits leaves the device, nor a host round trip.

To the host go three integers a request, and where log-probabilities are asked for the few that are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from dspark.errors import InternalError
from dspark.kernels.noise import signed_seed
from dspark.kernels.parts_triton import INTERPRETED, block_of
from dspark.kernels.top_triton import key_bits
from dspark.messages import Mode, PositionLogprobs, Sampling, SparseDistribution, TokenLogprob
from dspark.sampling.drafted import certain, share
from dspark.sampling.logprobs import logprobs
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import process
from dspark.sampling.rows import UNFILTERED, SamplingRows
from services.verifier.candidates import Candidate, Outcome, refused
from services.verifier.kernels.judge_triton import LAW, REPORT, SAMPLED, TESTED, judge_kernel, tile_kernel
from services.verifier.kernels.walk_triton import walk_kernel

__all__ = ["verify"]

_TILE = 32  # tokens of which the greatest logit is known; a head of 256 lies in 8,192 tokens
_BLOCK = 4096  # logits a program looks at in one go
_PART = 8192  # logits that are summed before a draw from what drafts leave of them
_WALK_BLOCK = 4096 if INTERPRETED.value else 512  # fewer where every one is compared with what was drafted
_CHUNK = 32  # pairs of the head, and drafted tokens, at a time


@dataclass(frozen=True, slots=True)
class _Row:
    """What judging one row of logits takes."""

    request: Candidate
    at: int

    @property
    def draft(self) -> int:
        tokens = self.request.draft_tokens
        return tokens[self.at] if self.at < len(tokens) else -1

    @property
    def tested(self) -> bool:
        sampling = self.request.sampling
        return self.draft >= 0 and sampling.mode is Mode.REJECTION and not sampling.greedy

    @property
    def drafted(self) -> SparseDistribution:
        known = self.request.draft_distributions
        sparse = known[self.at] if known else None
        return sparse if sparse and sparse.token_ids else certain(self.draft)

    @property
    def law(self) -> Sampling:
        """The settings that its law follows."""
        return UNFILTERED if self.request.sampling.greedy else self.request.sampling

    @property
    def flags(self) -> int:
        sampled, reported = not self.request.sampling.greedy, self.request.sampling.logprobs is not None
        return SAMPLED * sampled | TESTED * self.tested | LAW * (sampled or reported) | REPORT * reported

    @property
    def integers(self) -> tuple[int, ...]:
        request = self.request
        position = request.position + self.at
        seed = signed_seed(request.sampling.seed)
        return (
            request.first_row + self.at, position, self.draft, self.law.top_k, seed, request.position, self.flags, 0
        )  # fmt: skip

    @property
    def numbers(self) -> tuple[float, ...]:
        law = self.law
        q = share(self.drafted, self.draft) if self.tested else 1.0
        return (law.temperature, law.top_p, law.min_p, q)


@dataclass(frozen=True, slots=True)
class _Judged:
    """Tensors on the device: `out` (requests, 3), and per row `marks`, `masses` and the head in order."""

    out: torch.Tensor
    marks: torch.Tensor
    masses: torch.Tensor
    ids: torch.Tensor
    log_weights: torch.Tensor


@torch.inference_mode()
def verify(logits: torch.Tensor, requests: Sequence[Candidate], *, noise_candidates: int = 256) -> list[Outcome]:
    """As `verification.verify` with its exact rules and the keyed noise, all requests and rows at once."""
    outcomes: list[Outcome | None] = [refused(request, *logits.shape) for request in requests]
    places = [place for place, outcome in enumerate(outcomes) if outcome is None]
    if not places:
        return [outcome for outcome in outcomes if outcome is not None]
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    judged = [requests[place] for place in places]
    size = min(noise_candidates, logits.shape[1])
    found = _launch(logits, judged, size)
    reports = _reports(logits, judged, found, size)
    for place, request, (accepted, token, sound), report in zip(
        places, judged, found.out.tolist(), reports, strict=True
    ):
        outcomes[place] = Outcome(accepted, token, report) if sound else _broken(request.position + accepted)
    return [outcome for outcome in outcomes if outcome is not None]


def _broken(position: int) -> Outcome:
    return Outcome(0, -1, error=InternalError(f"the target's logits for position {position} are not finite"))


def _launch(logits: torch.Tensor, requests: Sequence[Candidate], size: int) -> _Judged:
    device, vocab = logits.device, logits.shape[1]
    table = [_Row(request, at) for request in requests for at in range(1 + len(request.draft_tokens))]
    rows = torch.tensor([row.integers for row in table], dtype=torch.int64).to(device)
    laws = torch.tensor([row.numbers for row in table], dtype=torch.float64).to(device)
    pitch, bits, stride = block_of(size), key_bits(logits.dtype), logits.stride(0)
    tiles, parts = triton.cdiv(vocab, _TILE), triton.cdiv(vocab, _BLOCK)

    def empty(dtype: torch.dtype, width: int, n: int = len(table)) -> torch.Tensor:
        return torch.empty(n, width, dtype=dtype, device=device)

    maxima, sums, broken = empty(torch.float32, tiles), empty(torch.float32, tiles), empty(torch.int32, parts)
    tile_kernel[(parts, len(table))](
        logits, rows, laws, maxima, sums, broken, vocab, stride, tiles, tile=_TILE, block=_BLOCK
    )
    marks, masses, out = empty(torch.int64, 5), empty(torch.float64, 3), empty(torch.int64, 3, len(requests))
    taken, head_ids, head_values = empty(torch.int32, pitch), empty(torch.int32, pitch), empty(torch.float32, pitch)
    sorted_ids, sorted_log_weights = empty(torch.int64, pitch), empty(torch.float64, pitch)
    judge_kernel[(len(table),)](
        logits, rows, laws, maxima, sums, broken, marks, masses, taken, head_ids, head_values, sorted_ids,
        sorted_log_weights, vocab, stride, tiles, parts, size, pitch=pitch, bits=bits,
        block=min(_BLOCK, block_of(vocab)), chunk=_CHUNK, tile=_TILE, tile_block=block_of(tiles),
        part_block=block_of(parts), num_warps=16,
    )  # fmt: skip
    longest = max(len(request.draft_tokens) for request in requests)
    q_ids, q_shares = _drafted(table, device)
    walk_kernel[(len(requests),)](
        logits, rows, laws, marks, masses, _firsts(requests).to(device), q_ids, q_shares, out, vocab, stride,
        q_ids.shape[1], reach=block_of(longest + 1), bits=bits, part=_PART, parts=block_of(triton.cdiv(vocab, _PART)),
        block=_WALK_BLOCK, chunk=_CHUNK, num_warps=8,
    )  # fmt: skip
    return _Judged(out, marks, masses, sorted_ids, sorted_log_weights)


def _firsts(requests: Sequence[Candidate]) -> torch.Tensor:
    """First row in the table and number of draft tokens of each request, int64 (n, 2)."""
    first, firsts = 0, []
    for request in requests:
        firsts.append((first, len(request.draft_tokens)))
        first += 1 + len(request.draft_tokens)
    return torch.tensor(firsts, dtype=torch.int64)


def _drafted(table: Sequence[_Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's q: ids int64 (R, longest), -1 where there is none, and renormalised shares float64."""
    drafted = [row.drafted if row.tested else SparseDistribution((), ()) for row in table]
    longest = max(1, *(len(q.token_ids) for q in drafted))
    missing = [longest - len(q.token_ids) for q in drafted]
    sums = [sum(q.probabilities) or 1.0 for q in drafted]
    ids = [[*q.token_ids, *[-1] * gap] for q, gap in zip(drafted, missing, strict=True)]
    shares = [
        [*(p / total for p in q.probabilities), *[0.0] * gap]
        for q, total, gap in zip(drafted, sums, missing, strict=True)
    ]
    return torch.tensor(ids).to(device), torch.tensor(shares, dtype=torch.float64).to(device)


def _reports(
    logits: torch.Tensor, requests: Sequence[Candidate], found: _Judged, size: int
) -> list[tuple[PositionLogprobs, ...]]:
    """What each request asked to be told about its emitted tokens."""
    if all(request.sampling.logprobs is None for request in requests):
        return [()] * len(requests)
    verdicts, firsts = found.out.tolist(), _firsts(requests).tolist()
    return [
        tuple(
            _report(logits, _Row(request, at), first + at, (*request.draft_tokens[:accepted], token)[at], found, size)
            for at in range(accepted + 1)
        )
        if request.sampling.logprobs is not None and sound
        else ()
        for request, (accepted, token, sound), (first, _) in zip(requests, verdicts, firsts, strict=True)
    ]


def _report(logits: torch.Tensor, row: _Row, place: int, token: int, found: _Judged, size: int) -> PositionLogprobs:
    """As `dspark.sampling.logprobs`; where more is asked for than the head holds, by it."""
    count, at = row.request.sampling.logprobs or 0, row.request.first_row + row.at
    if count > size:
        one = LogitRows.of(logits, [at])
        return logprobs(process(one, SamplingRows.of([row.law], logits.device), size), one, 0, token, count)
    log_total = found.masses[place, :1].log()
    chosen = (logits[at, token].double() - found.masses[place, 1:2]) / row.law.temperature - log_total
    values = torch.cat((chosen, found.log_weights[place, :count] - log_total)).tolist()
    best = zip(found.ids[place, :count].tolist(), values[1:], strict=True)
    return PositionLogprobs(
        TokenLogprob(token, values[0]), tuple(TokenLogprob(i, v) for i, v in best if v > -torch.inf)
    )
