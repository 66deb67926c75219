"""From target logits to verdicts: which draft tokens stand, and the token that follows them.

Every mode emits exactly the target's processed distribution (`dspark.messages.Sampling`):

- coupled, and temperature 0: a draft token stands while it equals the target's own choice at its position, so that
  the tokens do not depend on what was drafted or how much of it was verified;
- rejection (Leviathan, Kalman, Matias 2023; Chen et al. 2023), of a block as one (`services.verifier.trial`): one token
  stands with probability min(1, p(x)/q(x)), a block's tokens share what likely ones leave to spare. Behind those that
  stand comes a draw from what the target has left. A draft token that came without its distribution has q = 1 on
  itself. After the last draft token, the next one is chosen as in coupled mode: its noise is none that the drafter
  used. The verify length must not depend on the tokens it admits (DSpark Appendix A).

Noise is keyed by the position of the token being chosen, and for rejection mode's own numbers by the round's committed
length too: tokens of an earlier round, seen by a scheduler before they were thrown away, say nothing about the next.

A row of a request is judged only while a token behind it may stand: in coupled mode rows after the first difference
cost nothing. Who computed the logits and what becomes of the verdicts is left to the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dspark.errors import InternalError
from dspark.kernels.logits import TORCH_LOGITS, LogitKernels
from dspark.kernels.noise import KeyedBits, Stream, keyed_bits, streams, uniform
from dspark.messages import Mode, PositionLogprobs, SparseDistribution
from dspark.sampling.choice import choose
from dspark.sampling.drafted import certain
from dspark.sampling.logprobs import logprobs
from dspark.sampling.order import LogitRows, top
from dspark.sampling.processed import Law, process
from dspark.sampling.rejection import met, residual
from dspark.sampling.rows import UNFILTERED, SamplingRows
from services.verifier.candidates import Candidate, Outcome, refused
from services.verifier.trial import Trial, carried

__all__ = ["EXACT", "AcceptanceRules", "verify"]

_CHUNK_ELEMENTS = 1 << 21  # logits judged at a time: 8 rows of 262k, 8 MiB in float32


@dataclass(frozen=True, slots=True)
class AcceptanceRules:
    """When draft tokens stand.

    `coupled(drafts, choices)`: tensors of token ids -> which stand. `rejection(weight, p, q)`: a block's next weight
    (`services.verifier.trial.carried`). Only `EXACT` is lossless; others measure what losslessness is worth, or prove
    that a test bites.
    """

    coupled: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.eq
    rejection: Callable[[float, float, float], float] = carried


EXACT = AcceptanceRules()


@dataclass(eq=False, slots=True)
class _Walk:
    """A request on its way through its rows: `at` draft tokens are behind it."""

    index: int
    request: Candidate
    trial: Trial | None = None  # of a block tested by rejection
    at: int = 0
    logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def row(self) -> int:
        return self.request.first_row + self.at

    @property
    def draft(self) -> int:
        """The token on trial, or -1 past the last."""
        tokens = self.request.draft_tokens
        return tokens[self.at] if self.at < len(tokens) else -1

    @property
    def drafted(self) -> SparseDistribution:
        """q: what could have been proposed instead of the token on trial."""
        known = self.request.draft_distributions
        sparse = known[self.at] if known else None
        return sparse if sparse and sparse.token_ids else certain(self.draft)


@dataclass(frozen=True, slots=True)
class _Ruling:
    """What became of one row: the emitted token, whether the walk goes on, and whether the logits were sound."""

    token: int
    stands: bool
    sound: bool
    logprobs: PositionLogprobs | None


@dataclass(frozen=True, slots=True)
class _Court:
    """What stays the same during a call."""

    logits: torch.Tensor
    noise_candidates: int
    rules: AcceptanceRules
    bits: KeyedBits
    passes: LogitKernels


@torch.inference_mode()
def verify(
    logits: torch.Tensor,
    requests: Sequence[Candidate],
    *,
    noise_candidates: int = 256,
    rules: AcceptanceRules = EXACT,
    bits: KeyedBits = keyed_bits,
    passes: LogitKernels = TORCH_LOGITS,
) -> list[Outcome]:
    """Judge the draft tokens of many requests against the target.

    Args:
        logits: bfloat16 or float32 (rows, vocabulary) of the target, before temperature.
        requests: any mix of modes, verify lengths and samplings. Token ids out of range and distributions that are none
            get an Outcome with InvalidRequest.
        noise_candidates: tokens a row with noise of their own. Part of the numerics: another number gives other,
            equally distributed, tokens.
        rules: when a draft token stands.
        bits: the noise generator.
        passes: over whole rows of logits.

    Returns:
        One Outcome a request, in order, each the same whatever else is in the call.

    Raises:
        InternalError: a request names rows that the logits do not have.
    """
    court = _Court(logits, noise_candidates, rules, bits, passes)
    outcomes: list[Outcome | None] = [refused(request, *logits.shape) for request in requests]
    walks = [_Walk(i, request) for i, request in enumerate(requests) if outcomes[i] is None]
    _try(court, walks)
    at_once = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    while walks:
        going: list[_Walk] = []
        walks.sort(key=lambda walk: walk.request.sampling.greedy)
        for greedy, group in itertools.groupby(walks, key=lambda walk: walk.request.sampling.greedy):
            members = list(group)
            for start in range(0, len(members), at_once):
                chunk = members[start : start + at_once]
                for walk, ruling in zip(chunk, _judge(court, chunk, greedy=greedy), strict=True):
                    outcomes[walk.index] = _advance(walk, ruling)
                going += [walk for walk in chunk if outcomes[walk.index] is None]
        walks = going
    return [outcome for outcome in outcomes if outcome is not None]


def _advance(walk: _Walk, ruling: _Ruling) -> Outcome | None:
    """Take a ruling in; the outcome once the walk has ended."""
    if not ruling.sound:
        position = walk.request.position + walk.at
        return Outcome(0, -1, error=InternalError(f"the target's logits for position {position} are not finite"))
    if ruling.logprobs:
        walk.logprobs.append(ruling.logprobs)
    if ruling.stands:
        walk.at += 1
    elif walk.trial and walk.draft >= 0 and walk.trial.stood < walk.at:
        walk.trial.go_back()
        walk.at = walk.trial.stood
        del walk.logprobs[walk.at :]
    else:
        return Outcome(walk.at, ruling.token, tuple(walk.logprobs))
    return None


def _try(court: _Court, walks: Sequence[_Walk]) -> None:
    """Put the blocks of rejection mode on trial, each with the round's own numbers."""
    tested = [w for w in walks if w.request.draft_tokens and w.request.sampling.mode is Mode.REJECTION]
    tested = [walk for walk in tested if not walk.request.sampling.greedy]
    if not tested:
        return
    device = court.logits.device
    counts = torch.tensor([len(walk.request.draft_tokens) for walk in tested], device=device)
    seeds = SamplingRows.of([walk.request.sampling for walk in tested], device).seed.repeat_interleave(counts, 0)
    rounds = torch.tensor([walk.request.position for walk in tested], device=device).repeat_interleave(counts)[:, None]
    offsets = torch.cat([torch.arange(n, device=device) for n in counts.tolist()])[:, None]
    of = streams(0, Stream.ACCEPT, Stream.RESIDUAL, device=device)
    numbers = torch.split(uniform(court.bits(seeds, rounds, rounds + offsets, of)), counts.tolist())
    for walk, own in zip(tested, numbers, strict=True):
        walk.trial = Trial(own[:, 0].tolist(), own[:, 1].tolist())


def _judge(court: _Court, walks: Sequence[_Walk], *, greedy: bool) -> list[_Ruling]:
    """Rule on the present row of each walk."""
    logits = LogitRows.of(court.logits, [walk.row for walk in walks], court.passes)
    sound = logits.sound
    if not bool(sound.all()):
        logits.mend(sound)
    drafts = torch.tensor([walk.draft for walk in walks], device=sound.device)
    if greedy:
        law, tokens = None, top(logits, 1)[0].squeeze(-1)
        stands = court.rules.coupled(drafts, tokens) & (drafts >= 0)
    else:
        law, tokens, stands = _sampled(court, logits, walks, drafts)
    emitted = torch.where(stands, drafts, tokens).tolist()
    reports = _reports(court, law, logits, walks, emitted)
    return [_Ruling(*ruling) for ruling in zip(emitted, stands.tolist(), sound.tolist(), reports, strict=True)]


def _sampled(
    court: _Court, logits: LogitRows, walks: Sequence[_Walk], drafts: torch.Tensor
) -> tuple[Law, torch.Tensor, torch.Tensor]:
    """Laws, target tokens and which drafts stand, of rows with temperature > 0."""
    rows = SamplingRows.of([walk.request.sampling for walk in walks], drafts.device)
    positions = drafts.new_tensor([[walk.request.position + walk.at] for walk in walks])
    law = process(logits, rows, court.noise_candidates)
    tokens = choose(law, rows.seed, positions, court.bits)
    stands = court.rules.coupled(drafts, tokens) & (drafts >= 0)
    tested = [i for i, walk in enumerate(walks) if walk.trial and walk.draft >= 0]
    if tested:
        at, some = drafts.new_tensor(tested), [walks[i] for i in tested]
        stands[at], tokens[at] = _tested(court, law, at, some, tokens[at])
    return law, tokens, stands


def _tested(
    court: _Court, law: Law, at: torch.Tensor, walks: Sequence[_Walk], choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which walks at the rows `at` go on, and what the target draws where one ends."""
    trials = [walk.trial for walk in walks if walk.trial]
    drafted = [walk.drafted for walk in walks]
    weights = law.total.new_tensor([[trial.weight] for trial in trials])
    drafts = at.new_tensor([[walk.draft] for walk in walks])
    numbers = torch.stack(met(law, at, drafted, drafts, weights), 1).tolist()
    on = [
        trial.goes_on(walk.at, p, q, both, court.rules.rejection)
        for trial, walk, (p, q, both) in zip(trials, walks, numbers, strict=True)
    ]
    tokens = choices.clone()
    over = [i for i, trial in enumerate(trials) if not on[i] and trial.stood == walks[i].at]
    if over:
        chances = weights.new_tensor([trials[i].residual[walks[i].at] for i in over])
        possible = [drafted[i] for i in over]
        tokens[over] = residual(law, at[over], possible, weights[over], chances, choices[over])
    return torch.tensor(on, device=at.device), tokens


def _reports(
    court: _Court, law: Law | None, logits: LogitRows, walks: Sequence[_Walk], emitted: Sequence[int]
) -> list[PositionLogprobs | None]:
    """Log-probabilities of the emitted tokens, where asked for."""
    counts = [walk.request.sampling.logprobs for walk in walks]
    if law is None and any(count is not None for count in counts):
        law = process(logits, SamplingRows.of([UNFILTERED] * len(walks), logits.values.device), court.noise_candidates)
    return [
        None if count is None or law is None else logprobs(law, logits, row, token, count)
        for row, (count, token) in enumerate(zip(counts, emitted, strict=True))
    ]
