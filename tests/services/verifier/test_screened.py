"""Verdicts from bounds on logits: greedy ones those of logits, coupled ones of the reference's law and distribution."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from support.markov import World, fit, generate, sequence_distribution

from dspark.kernels import team
from dspark.kernels.logits import BLOCK, TORCH_LOGITS
from dspark.kernels.screen import PEAKED
from dspark.messages import Mode, Sampling
from dspark.sampling import DraftChooser
from dspark.sampling.rows import SamplingRows
from services.verifier import race
from services.verifier.candidates import Candidate, Outcome
from services.verifier.verification import verify

screen_llvm = pytest.importorskip("dspark.kernels.screen_llvm")
screened_llvm = pytest.importorskip("services.verifier.kernels.screened_llvm")

pytestmark = pytest.mark.skipif(
    not team.available() or None in (screen_llvm.compiled().bounded_codes, screen_llvm.compiled().dots),
    reason="no AVX512-VNNI or no AVX512-BF16 instructions here",
)
GREEDY = Sampling(temperature=0.0)
INPUTS = 64


class Court:
    """A head, rows in front of it, and how often their logits were asked for."""

    def __init__(self, table: torch.Tensor, hidden: torch.Tensor) -> None:
        self.head, self.hidden = screen_llvm.ScreenedHead(table), hidden
        self.logits = self.head.whole()(hidden)
        rows = len(hidden), self.head.width
        self.bounds = self.head.above(hidden, torch.empty(rows), torch.empty(rows[0], rows[1] // PEAKED))
        self.asked: list[int] = []
        self.calls = 0

    @classmethod
    def random(cls, rows: int, vocab: int, *, spread: float = 2.0, far: float = 1.0, seed: int = 1) -> "Court":
        """Logits of so great a spread; the greater `far`, the looser are their bounds."""
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(vocab, INPUTS, generator=generator).bfloat16()
        hidden = torch.randn(rows, INPUTS, generator=generator) * spread / INPUTS**0.5
        table[:, -8:], hidden[:, -8:] = 0.0, far  # nothing in a logit, much in its bound
        return cls(table, hidden)

    def judge(self, requests: Sequence[Candidate], size: int = 16, **settings: Any) -> list[Outcome]:
        outcomes: list[Outcome] = screened_llvm.verify(
            settings.get("hidden", self.hidden),
            requests,
            screen=self.head,
            whole=self._whole,
            noise_candidates=size,
            by_logits=verify,
            passes=TORCH_LOGITS,
        )
        return outcomes

    def expected(self, request: Candidate, size: int = 16) -> Outcome:
        """By the references, row by row."""
        for at in range(len(request.draft_tokens) + 1):
            token = self._choice(request, at, size)
            if at == len(request.draft_tokens) or request.draft_tokens[at] != token:
                return Outcome(at, token)
        raise AssertionError

    def _choice(self, request: Candidate, at: int, size: int) -> int:
        row, sampling = request.first_row + at, request.sampling
        exact = lambda token: float(self.logits[row, token])  # noqa: E731 - of this row
        if sampling.greedy:
            return race.greatest(self.bounds[row], exact)
        own = SamplingRows.of([sampling], self.bounds.device)
        token = race.choose(self.bounds[row : row + 1], exact, own, request.position + at, size)
        if token is not None:
            return token
        lone = Candidate(sampling, 0, request.position + at)
        return verify(self.logits[row : row + 1], [lone], noise_candidates=size)[0].token

    def _whole(self, rows: Sequence[int]) -> torch.Tensor:
        self.asked += rows
        self.calls += 1
        chosen: torch.Tensor = self.logits[torch.tensor(rows)]
        return chosen


def make_requests(court: Court, count: int, *temperatures: float) -> list[Candidate]:
    chance, requests = random.Random(count), []
    for index in range(count):
        sampling = Sampling(temperature=chance.choice(temperatures), seed=chance.getrandbits(64))
        length = index % 5
        request = Candidate(sampling, chance.randrange(len(court.hidden) - length), chance.randrange(1, 500))
        for at in range(length):  # mostly what is chosen there
            likely = court.expected(replace(request, first_row=request.first_row + at, position=request.position + at))
            token = likely.token if chance.random() < 0.8 else chance.randrange(court.logits.shape[1])
            request = replace(request, draft_tokens=(*request.draft_tokens, token))
        requests.append(request)
    return requests


@pytest.mark.parametrize("far", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("vocab", [5, 64, 1000, 20_032])
def test_verdicts_are_the_references(vocab: int, far: float) -> None:
    court = Court.random(12, vocab, far=far)
    requests = make_requests(court, 60, 0.0, 0.5, 1.0, 2.5)
    outcomes = court.judge(requests)
    assert outcomes == [court.expected(request) for request in requests]
    assert max(o.accepted for o in outcomes) == 4
    assert any(o.accepted < len(r.draft_tokens) for o, r in zip(outcomes, requests, strict=True))
    for request, outcome in list(zip(requests, outcomes, strict=True))[::7]:
        assert court.judge([request]) == [outcome]
    if far == 1.0 and vocab <= 1000:
        assert not court.asked


def test_greedy_tokens_are_those_of_logits_where_many_are_alike() -> None:
    court = Court.random(40, 3_000)
    table = court.head.table.clone()
    table[1::2] = table[::2]  # two tokens of every logit, and the lower one wins
    court = Court(table, court.hidden)
    requests = [Candidate(GREEDY, row, 9) for row in range(40)]
    assert court.judge(requests) == verify(court.logits, requests)
    assert all(outcome.token % 2 == 0 for outcome in court.judge(requests))
    equal = Court(table[:1].expand(700, -1).contiguous(), court.hidden[:3])
    assert [o.token for o in equal.judge([Candidate(GREEDY, row, 9) for row in range(3)])] == [0, 0, 0]


def test_rows_that_bounds_leave_undecided_are_judged_by_logits() -> None:
    """Flat rows at a low temperature: bounds weigh far more than logits, and arrivals would not end."""
    court = Court.random(8, 2_000, spread=0.2, far=60.0)
    requests = make_requests(court, 80, 0.05)
    outcomes = court.judge(requests)
    assert len(set(court.asked)) == 8
    assert outcomes == [court.expected(request) for request in requests]
    assert max(o.accepted for o in outcomes) == 4


@pytest.mark.parametrize("far", [1.0, 10.0])
@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.02])
def test_low_temperatures_are_greedy_by_logits_not_by_bounds(temperature: float, size: int, far: float) -> None:
    """Of bounds, weights far below the greatest are nothing, though their tokens' logits may be the greatest."""
    court = Court.random(40, 2_000, far=far)
    requests = [Candidate(Sampling(temperature=temperature, seed=s), s, 9) for s in range(40)]
    outcomes = court.judge(requests, size)
    assert outcomes == [court.expected(request, size) for request in requests]
    best, second = court.logits.topk(2).values.T
    clear = (best - second > 40 * temperature).tolist()
    assert sum(clear) > 5
    for outcome, token, sure in zip(outcomes, court.logits.argmax(1).tolist(), clear, strict=True):
        assert outcome.token == token or not sure


def test_greedy_rows_of_too_many_candidates_are_judged_by_logits() -> None:
    court = Court.random(3, 12_000, spread=0.01, far=60.0)
    requests = [Candidate(GREEDY, 0, 9, (5,)), *(Candidate(GREEDY, row, 9) for row in range(3))]
    assert int((court.bounds >= court.logits.amax(1, keepdim=True)).sum(1).min()) > race.MOST_LOOKED_UP
    assert court.judge(requests) == verify(court.logits, requests)
    assert court.asked == [0, 0, 1, 2]


def test_filters_and_rejection_are_judged_by_logits_beside_others() -> None:
    court = Court.random(8, 900)
    kinds = (
        Sampling(top_p=0.9, seed=1), GREEDY, Sampling(mode=Mode.REJECTION, seed=2), Sampling(seed=3),
        Sampling(top_k=3, seed=4), Sampling(min_p=0.1, seed=5), Sampling(temperature=0.0, top_k=5),
    )  # fmt: skip
    requests = [Candidate(sampling, row, 40, (7,)) for row, sampling in enumerate(kinds)]
    outcomes = court.judge(requests)
    assert sorted(set(court.asked)) == [0, 1, 2, 3, 4, 5, 6]
    for place in (0, 2, 4, 5):
        assert outcomes[place] == verify(court.logits, [requests[place]], noise_candidates=16)[0]
    for place in (1, 3, 6):
        assert outcomes[place] == court.expected(requests[place])
    assert court.judge([]) == []


def test_log_probabilities_change_no_token() -> None:
    court = Court.random(8, 900)
    plain = make_requests(court, 30, 0.0, 1.0)
    asked = [replace(request, sampling=replace(request.sampling, logprobs=3)) for request in plain]
    outcomes = court.judge(asked)
    assert court.calls == 1  # for all of them
    assert [replace(outcome, logprobs=()) for outcome in outcomes] == court.judge(plain)
    for request, outcome in zip(asked, outcomes, strict=True):
        assert len(outcome.logprobs) == outcome.accepted + 1
        for at, report in enumerate(outcome.logprobs):
            law = court.logits[request.first_row + at].double().log_softmax(-1)
            assert report.chosen.logprob == pytest.approx(float(law[report.chosen.token_id]), abs=1e-5)
            assert [top.token_id for top in report.top] == law.topk(3).indices.tolist()


def test_broken_rows_and_requests_hurt_no_other() -> None:
    court = Court.random(8, 900)
    hidden = court.hidden.clone()
    hidden[2, 5], hidden[4] = torch.nan, torch.inf
    requests = [Candidate(sampling, row, 40) for row in range(8) for sampling in (GREEDY, Sampling(seed=row))]
    requests += [Candidate(GREEDY, 0, 40, (900,)), Candidate(Sampling(seed=9), 2, 40, (3,))]
    outcomes = court.judge(requests, hidden=hidden)
    broken = [place for place, outcome in enumerate(outcomes) if outcome.error]
    assert broken == [4, 5, 8, 9, 16, 17]
    assert "position 40 are not finite" in str(outcomes[4].error)
    assert "outside the vocabulary" in str(outcomes[16].error)
    sound = [place for place in range(16) if place not in broken]
    assert [outcomes[place] for place in sound] == [court.expected(requests[place]) for place in sound]


# ---- the distribution


def flat_row(seed: int = 3) -> Court:
    """One row of ten blocks, of which seven are low for a head of two: together they have most of the weight."""
    return Court.random(1, 10 * BLOCK, spread=1.6, far=2.0, seed=seed)


def test_low_blocks_have_their_greatest_bound_for_all_tokens_and_the_head_stays() -> None:
    court = flat_row()
    loose, bounds = race.loosened(court.bounds, 2), court.bounds
    assert bool((loose >= bounds).all())
    raised = (loose > bounds).view(-1, BLOCK).any(1)
    assert raised.sum() == 10 - race.high_blocks(10, 2) - 1  # the last one keeps its own in any case
    assert not raised[-1]
    assert torch.equal(loose.topk(2).indices, bounds.topk(2).indices)
    assert torch.equal(loose.view(-1, BLOCK)[raised].amax(1), bounds.view(-1, BLOCK)[raised].amax(1))
    assert torch.equal(race.loosened(bounds, 10), bounds)


def test_tokens_of_low_blocks_follow_the_target() -> None:
    """A control takes rates for weights: every token of a low block is then as likely as its likeliest."""
    court, size, draws = flat_row(), 2, 60_000
    requests = [Candidate(Sampling(temperature=1.2, seed=10**11 + index), 0, 7) for index in range(draws)]
    expected = (court.logits[0].double() / 1.2).softmax(0).numpy() * draws
    low = (race.loosened(court.bounds, size) > court.bounds).view(-1, BLOCK).any(1).repeat_interleave(BLOCK).numpy()
    assert low.sum() == 7 * BLOCK

    def unlikely(tokens: list[int]) -> float:
        counts = np.bincount(tokens, minlength=len(expected))
        rare = expected < 10
        found, mean = (np.append(of[~rare], of[rare].sum()) for of in (counts, expected))
        return float(scipy.stats.chisquare(found, mean * found.sum() / mean.sum()).pvalue)

    tokens = [outcome.token for outcome in court.judge(requests, size)]
    assert 0.2 * draws < low[tokens].sum() < 0.8 * draws
    assert unlikely(tokens) > 0.001
    assert not court.asked
    wrong = verify(race.loosened(court.bounds, size), requests, noise_candidates=size)
    assert unlikely([outcome.token for outcome in wrong]) < 0.001


def screened_world(seed: int, vocab: int) -> tuple[World, Court]:
    """A Markov chain whose logits are a head's over one row a token; bounds are about two above them."""
    court = Court.random(vocab, vocab, spread=1.2, far=10.0, seed=seed)
    assert 1.0 < float((court.bounds - court.logits).mean()) < 4.0
    return replace(World.random(seed, vocab), target=court.logits.clone()), court


def test_three_tokens_follow_the_target() -> None:
    """Where most tokens are of the rest, and most arrivals have to be refused; bounds taken for logits do not."""
    world, court = screened_world(2, 12)

    def states(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, None] == world.target).all(-1).int().argmax(1)

    def judged(logits: torch.Tensor, requests: Sequence[Candidate], **settings: Any) -> list[Outcome]:
        return court.judge(requests, settings["noise_candidates"], hidden=court.hidden[states(logits)])

    def biased(logits: torch.Tensor, requests: Sequence[Candidate], **settings: Any) -> list[Outcome]:
        return verify(court.bounds[states(logits)], requests, noise_candidates=settings["noise_candidates"])

    samplings = [Sampling(temperature=1.4, seed=10**12 + i) for i in range(30_000)]
    hard = partial(generate, block=2, chooser=DraftChooser(draft_top_k=3), noise_candidates=2)
    run = hard(world, samplings, 3, verify=judged)
    assert min(run.verified, run.accepted, run.rejected) > 3_000
    expected = {length: sequence_distribution(world, samplings[0], length) for length in (1, 3)}
    assert min(fit(run, expected[length]) for length in (1, 3)) > 0.001
    wrong = hard(world, samplings, 3, verify=biased)
    assert max(fit(wrong, expected[length]) for length in (1, 3)) < 0.001
