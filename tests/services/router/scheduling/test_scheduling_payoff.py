"""Stepping back where speculation loses, and coming back when it pays: a state machine driven by made-up rounds."""

from collections.abc import Callable

import numpy as np
import pytest

from services.router.scheduling.payoff import Decision, Payoff, Payoffs


def run(
    payoff: Payoff | Payoffs,
    rounds: int,
    gain: Callable[[int], float],
    *,
    load: int = 32,
    noise: float = 0.15,
    seed: int = 0,
) -> list[Decision]:
    """Rounds in which a block limited to `limit` yields gain(limit) times plain decoding's tokens a second."""
    generator, decisions = np.random.default_rng(seed), []
    for _ in range(rounds):
        decision = payoff.decide(load)
        ratio = gain(decision.limit) if decision.limit else 1.0
        seconds = 0.1 * generator.lognormal(0, 0.05)
        tokens = load * (1.0 if not decision.limit else ratio * generator.lognormal(0, noise))
        own = payoff.of(decision) if isinstance(payoff, Payoffs) else payoff
        own.observe(
            decision,
            drafted=decision.limit > 0,
            tokens=tokens,
            seconds=seconds,
            plain_tokens=load,
            plain_seconds=0.1,
        )
        decisions.append(decision)
    return decisions


def test_where_it_pays_nothing_is_done() -> None:
    payoff = Payoff(7)
    assert {d.limit for d in run(payoff, 2000, lambda _: 1.4)} == {7}
    assert payoff.changes == 0
    assert payoff.advantage == pytest.approx(0.4, abs=0.1)


def test_it_says_that_drafts_win_once_rounds_have_shown_it() -> None:
    payoff = Payoff(7)
    assert not payoff.wins
    run(payoff, 11, lambda _: 1.3)
    assert not payoff.wins  # too few
    run(payoff, 30, lambda _: 1.3, seed=1)
    assert payoff.wins


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.02])
def test_it_does_not_say_so_where_they_hardly_do(gain: float) -> None:
    payoff = Payoff(7)
    run(payoff, 200, lambda _: gain)
    assert not payoff.wins


def test_what_was_won_says_nothing_of_another_load() -> None:
    payoffs = Payoffs(7)
    run(payoffs, 100, lambda _: 1.3, load=2)
    assert payoffs.now.wins
    payoffs.decide(3)
    assert payoffs.now.wins  # of the same size
    payoffs.decide(4)
    assert not payoffs.now.wins
    run(payoffs, 300, lambda _: 0.7, load=4)
    assert payoffs.now.limit == 0
    payoffs.decide(2)
    assert payoffs.now.wins
    assert payoffs.now.limit == 7


def test_a_lesson_that_comes_late_is_of_the_load_it_was_decided_for() -> None:
    payoffs = Payoffs(7)
    for _ in range(100):
        decision = payoffs.decide(1)
        payoffs.decide(16)
        payoffs.of(decision).observe(decision, drafted=True, tokens=0.5, seconds=0.1, plain_tokens=1, plain_seconds=0.1)
    assert payoffs.now.limit == 7
    payoffs.decide(1)
    assert payoffs.now.limit == 0


def test_it_backs_off_to_none_and_probes_rarely() -> None:
    payoff = Payoff(7)
    run(payoff, 300, lambda _: 0.7)
    assert payoff.limit == 0
    later = run(payoff, 3000, lambda _: 0.7, seed=1)
    probes = [d for d in later if d.probe]
    assert payoff.limit == 0
    assert 4 <= len(probes) <= 3000 / 32
    first, last = (sum(d.probe for d in part) for part in (later[:750], later[-750:]))
    assert last < first  # exponentially rarer


def test_drafts_of_others_beside_plain_decoding_are_not_judged() -> None:
    payoff = Payoff(7)
    run(payoff, 300, lambda _: 0.7)
    assert payoff.limit == 0
    for _ in range(40):
        decision = payoff.decide(32)
        payoff.observe(decision, drafted=True, tokens=20, seconds=0.2, plain_tokens=32, plain_seconds=0.1)
    assert payoff.limit == 0


def test_shorter_blocks_are_enough_where_only_long_ones_lose() -> None:
    payoff = Payoff(7)
    run(payoff, 3000, lambda limit: 0.8 if limit > 4 else 1.3)
    assert payoff.limit == 4


def test_it_returns_when_it_pays_again() -> None:
    payoff = Payoff(7)
    run(payoff, 400, lambda _: 0.6)
    assert payoff.limit == 0
    run(payoff, 3000, lambda _: 1.5, seed=2)
    assert payoff.limit == 7


def test_a_lighter_load_is_tried_at_once() -> None:
    payoffs = Payoffs(7)
    run(payoffs, 2500, lambda _: 0.6, load=64)
    assert payoffs.now.limit == 0
    assert {d.limit for d in run(payoffs, 600, lambda _: 1.5, load=8)} == {7}


@pytest.mark.parametrize("gain", [0.96, 0.99, 1.0, 1.01, 1.04])
def test_it_does_not_flap_about_break_even(gain: float) -> None:
    changes = []
    for seed in range(5):
        payoff = Payoff(7)
        run(payoff, 5000, lambda _: gain, noise=0.3, seed=seed)
        changes.append(payoff.changes)
    assert np.median(changes) <= 8
    assert max(changes) <= 16


def test_single_odd_rounds_change_nothing() -> None:
    payoff = Payoff(7)
    run(payoff, 100, lambda _: 1.3)
    for _ in range(3):
        decision = payoff.decide(32)
        payoff.observe(decision, drafted=True, tokens=32, seconds=5.0, plain_tokens=32, plain_seconds=0.1)
        run(payoff, 30, lambda _: 1.3)
    assert (payoff.limit, payoff.changes) == (7, 0)


def test_plain_rounds_correct_the_costs() -> None:
    """Costs say that plain steps take 0.1 s, and they take 0.2: drafts are worth twice what it seems."""
    payoff = Payoff(7)
    for _ in range(100):
        payoff.observe(Decision(0), drafted=False, tokens=8, seconds=0.2, plain_tokens=8, plain_seconds=0.1)
    for _ in range(100):
        decision = payoff.decide(8)
        payoff.observe(decision, drafted=True, tokens=14, seconds=0.25, plain_tokens=8, plain_seconds=0.1)
    assert payoff.limit == 7
    assert payoff.advantage == pytest.approx(0.4, abs=0.02)


def test_blocks_of_one_have_two_levels() -> None:
    assert Payoff(1).levels == (1, 0)
    assert Payoff(0).levels == (0,)
    assert {d.limit for d in run(Payoff(0), 10, lambda _: 1.0)} == {0}


def test_a_probe_decided_before_a_step_back_is_none_of_the_level_below() -> None:
    """Lessons come a round late: a probe of the whole block may end when nothing at all is settled on already."""
    payoff, late, now = Payoff(7), Decision(7, probe=True), Decision(4, probe=True)
    run(payoff, 300, lambda _: 0.7)
    assert payoff.limit == 0
    for _ in range(20):
        payoff.observe(late, drafted=True, tokens=96, seconds=0.1, plain_tokens=32, plain_seconds=0.1)
    assert payoff.limit == 0
    for _ in range(20):
        payoff.observe(now, drafted=True, tokens=96, seconds=0.1, plain_tokens=32, plain_seconds=0.1)
    assert payoff.limit > 0
