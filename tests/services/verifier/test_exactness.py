"""Emitted tokens follow the target's processed distribution exactly, whatever is drafted and verified."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support import kernels as choices
from support.markov import Run, World, fit, generate, sequence_distribution

from dspark.messages import Mode, Sampling
from dspark.sampling import DraftChooser
from dspark.sampling.choice import choose
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import process
from dspark.sampling.rows import SamplingRows
from services.verifier.candidates import Outcome
from services.verifier.kernels import verifier_kernels
from services.verifier.verification import AcceptanceRules

SAMPLES = 50_000
Verify = Callable[..., list[Outcome]]
MODES = pytest.mark.parametrize("mode", list(Mode))
EAGER = AcceptanceRules(
    coupled=lambda drafts, choices: (drafts == choices) | (drafts % 4 == 0),
    rejection=lambda weight, p, q: min(1.0, 1.3 * weight * p / q),
)
"""Biased: draft tokens stand a little too often."""


def samplings(mode: Mode, count: int = SAMPLES, **settings: float) -> list[Sampling]:
    base = Sampling(mode=mode, **settings)  # type: ignore[arg-type]
    return [replace(base, seed=10**12 + i) for i in range(count)]


def fits(run: Run, world: World, sampling: Sampling) -> list[float]:
    """p-values of the next token and of three tokens."""
    return [fit(run, sequence_distribution(world, sampling, length)) for length in (1, 3)]


def varied(round_: int, drafts: np.ndarray) -> np.ndarray:
    """Verify lengths 0 to 2 from what the last round drafted: settled before this round's drafts exist."""
    return np.asarray((drafts.sum(1) + round_ + 4) % 3)


@pytest.fixture(params=["torch", "llvm"])
def verify(request: pytest.FixtureRequest) -> Verify:
    return verifier_kernels(choices.named(request.param)).verify


@MODES
def test_three_tokens_follow_the_target(mode: Mode, verify: Verify) -> None:
    world, requests = World.random(1, 6), samplings(mode)
    run = generate(world, requests, 3, block=2, lengths=varied, verify=verify)
    assert min(run.verified, run.accepted, run.rejected) > SAMPLES // 10
    assert min(fits(run, world, requests[0])) > 0.001
    biased = generate(world, requests[:10_000], 3, block=2, lengths=varied, rules=EAGER)
    assert max(fits(biased, world, requests[0])) < 0.001


@MODES
def test_three_tokens_follow_the_target_where_most_of_them_have_no_noise_of_their_own(mode: Mode) -> None:
    """Compiled, too, which filters keep from the hard branches below."""
    world, requests = World.random(2, 12), samplings(mode, temperature=1.4)
    assert share_of_rest(world, requests, candidates=2) > 0.2
    hard = partial(generate, block=2, lengths=varied, chooser=DraftChooser(draft_top_k=3), noise_candidates=2)
    run = hard(world, requests, 3, verify=verifier_kernels(choices.named("llvm")).verify)
    assert min(run.verified, run.accepted, run.rejected) > SAMPLES // 10
    assert min(fits(run, world, requests[0])) > 0.001


@MODES
def test_three_tokens_follow_the_target_through_the_hard_branches(mode: Mode) -> None:
    world = World.random(2, 12, reduced=[0, 1, 3, 4, 7, 8, 11])
    requests = samplings(mode, temperature=1.4, top_k=9, top_p=0.9)
    hard = partial(generate, block=2, lengths=varied, chooser=DraftChooser(draft_top_k=3), noise_candidates=2)
    assert share_of_rest(world, requests, candidates=2) > 0.2
    run = hard(world, requests, 3)
    assert min(run.verified, run.accepted, run.rejected) > SAMPLES // 10
    assert min(fits(run, world, requests[0])) > 0.001
    biased = hard(world, requests[:10_000], 3, rules=EAGER)
    assert max(fits(biased, world, requests[0])) < 0.001


def share_of_rest(world: World, requests: list[Sampling], candidates: int) -> float:
    """How many of the first tokens are drawn from the group of the rest."""
    rows = SamplingRows.of(requests, world.target.device)
    law = process(LogitRows.of(world.target, [0] * len(requests)), rows, candidates)
    tokens = choose(law, rows.seed, torch.ones_like(rows.seed))
    return float((tokens.unsqueeze(-1) != law.ids).all(-1).double().mean())


# ---- blocks that stand or fall as one (rejection)


def expected_accepted(world: World, block: int, *, carry: bool) -> float:
    """Accepted tokens of a first round: with `carry`, of a block on trial as one, else token by token."""
    p, q = world.target.double().softmax(-1), world.drafter.double().softmax(-1)
    alive, total = {(0, 1.0): 1.0}, 0.0  # (last token, w) of every block -> probability that it was drawn
    for _ in range(block):
        following: dict[tuple[int, float], float] = {}
        for (last, weight), drawn in alive.items():
            for token in range(len(p)):
                ratio = float(p[last, token] / q[last, token])
                state = (token, min(1.0, weight * ratio) if carry else weight * min(1.0, ratio))
                following[state] = following.get(state, 0.0) + drawn * float(q[last, token])
        alive = following
        total += sum(weight * drawn for (_, weight), drawn in alive.items())
    return total


def test_a_block_on_trial_as_one_keeps_more_than_its_tokens_one_by_one() -> None:
    world = World.random(3, 6)
    requests = samplings(Mode.REJECTION, 20_000)
    accepted = generate(world, requests, 1, block=3).accepted / len(requests)
    expected, one_by_one = (expected_accepted(world, 3, carry=carry) for carry in (True, False))
    assert expected > one_by_one * 1.03
    assert abs(accepted - expected) < 4 * 1.2 / len(requests) ** 0.5


def test_whether_a_further_token_is_verified_may_depend_on_all_before_it() -> None:
    """Lengths 1 to 3, each next token admitted by those before: exact; by itself: biased."""
    world, requests = World.random(1, 6), samplings(Mode.REJECTION, 30_000)

    def admitted(drafts: np.ndarray, looking_at: int) -> np.ndarray:
        second = drafts[:, looking_at] % 2 == 0
        third = second & (drafts[:, looking_at + 1] > 1)
        return np.asarray(1 + second.astype(int) + third)

    run = generate(world, requests, 3, block=3, plan=lambda drafts: admitted(drafts, 0))
    assert min(fits(run, world, requests[0])) > 0.001
    biased = generate(world, requests, 3, block=3, plan=lambda drafts: admitted(drafts, 1))
    assert min(fits(biased, world, requests[0])) < 0.001


# ---- verify lengths that look at what they admit (DSpark Appendix A)

PAPER = World(torch.tensor([[0.7, 0.3]]).log().repeat(2, 1), torch.tensor([[0.5, 0.5]]).log().repeat(2, 1))
STEPS_PER_SECOND = np.array([1.0, 0.5, 0.45])


def gains(first: np.ndarray) -> np.ndarray:
    """Θ of verify lengths 0, 1, 2 for each first draft token: a_1 = 0.8, then c_2 = 0.9 after A (0), 0 after B (1)."""
    survival = np.stack((np.full(first.shape, 0.8), np.where(first == 0, 0.72, 0.0)), 1)
    return np.asarray(np.cumsum(np.insert(survival, 0, 1.0, axis=1), axis=1) * STEPS_PER_SECOND)


def retrospective(drafts: np.ndarray) -> np.ndarray:
    """The best length of all, looking past the first drop."""
    return np.asarray(gains(drafts[:, 0]).argmax(1))


def early_stop(drafts: np.ndarray) -> np.ndarray:
    """The length before the first drop: what it admits, it decides from the tokens before."""
    drops = np.diff(gains(drafts[:, 0]), axis=1) < 0
    return np.asarray(np.where(drops.any(1), drops.argmax(1), drops.shape[1]))


@pytest.mark.parametrize(
    ("mode", "schedule", "expected"),
    [
        (Mode.REJECTION, retrospective, 0.85),
        (Mode.REJECTION, early_stop, 0.7),
        (Mode.COUPLED, retrospective, 0.7),
        (Mode.COUPLED, early_stop, 0.7),
    ],
)
def test_a_scheduler_may_not_look_at_what_it_admits(
    mode: Mode, schedule: Callable[[np.ndarray], np.ndarray], expected: float
) -> None:
    count = 10_000
    run = generate(PAPER, samplings(mode, count), 1, block=2, plan=schedule)
    share = float((run.tokens[:, 0] == 0).mean())
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("keyed_by_round", [True, False])
def test_a_length_from_the_last_round_needs_drafts_with_noise_of_their_own(keyed_by_round: bool) -> None:
    """Planning from an earlier round's confidences is allowed, if drafts thrown away say nothing about new ones."""
    far = World(PAPER.target, torch.tensor([[0.2, 0.8]]).log().repeat(2, 1))

    def by_last_second_draft(round_: int, drafts: np.ndarray) -> np.ndarray:
        return np.ones(len(drafts), dtype=int) if round_ == 0 else (drafts[:, 1] == 1).astype(int)

    requests = samplings(Mode.REJECTION, 10_000)
    run = generate(far, requests, 2, block=2, lengths=by_last_second_draft, keyed_by_round=keyed_by_round)
    exact = fit(run, sequence_distribution(far, requests[0], 2))
    assert exact > 0.001 if keyed_by_round else exact < 0.001
