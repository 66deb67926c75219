"""What drafting may lose of plain decoding's time."""

import random

import pytest

from services.router.scheduling.allowance import BEGIN, GRACE, REOPEN, SHARE, Allowance

BEGINNING = 4.0  # plain rounds' time that drafters' first round takes more


def lost(gained: float, took: float, rounds: int, *, load: int = 16, seed: int = 0) -> tuple[float, int]:
    """Share of the time lost and rounds with drafts, of a scheduler that drafts whenever it may.

    A round with drafts has so many plain rounds' tokens and takes as long as so many, and more after a plain one.
    """
    draw, allowance = random.Random(seed), Allowance()
    tokens = seconds = 0.0
    drafted, before = 0, False
    for _ in range(rounds):
        now = allowance.open(load)
        round_tokens = gained * draw.uniform(0.6, 1.4) if now else 1.0
        round_seconds = (took if before else took + BEGINNING) if now else 1.0
        if now:
            allowance.tried(load, gained=round_tokens, took=round_seconds, usual=before)
        else:
            allowance.plain(load)
        tokens, seconds, drafted, before = tokens + round_tokens, seconds + round_seconds, drafted + now, now
    return 1 - tokens / seconds, drafted


@pytest.mark.parametrize(("gained", "took"), [(1.4, 1.55), (1.0, 2.0), (3.0, 3.5), (0.9, 1.0)])
def test_what_loses_costs_a_hundredth_of_the_time_and_is_tried_again_for_ever(gained: float, took: float) -> None:
    share, drafted = lost(gained, took, 20_000)
    assert 0.3 * SHARE < share < 2.5 * SHARE
    assert drafted > 30


def test_what_wins_goes_on_without_a_pause() -> None:
    share, drafted = lost(1.8, 1.4, 2000)
    assert drafted == 2000
    assert share < -0.2


def test_what_wins_a_little_is_drafted_for_mostly() -> None:
    share, drafted = lost(1.6, 1.4, 20_000)
    assert drafted > 10_000
    assert share < -0.05


def test_a_hundredth_less_than_plain_decoding_is_no_reason_to_stop_for_long() -> None:
    share, drafted = lost(1.40, 1.41, 5000)
    assert drafted > 200
    assert share < 2.5 * SHARE


def test_one_slow_round_closes_nothing_that_has_won() -> None:
    allowance = Allowance()
    for _ in range(100):
        allowance.tried(1, gained=2.2, took=1.5)
    allowance.tried(1, gained=2.2, took=21.0)
    assert allowance.open(1)


def closed(load: int = 9) -> Allowance:
    """After a few rounds that lost."""
    allowance = Allowance()
    while allowance.open(load):
        allowance.tried(load, gained=1.0, took=1.3)
    return allowance


def test_plain_rounds_never_save_up_more_than_is_there_at_first() -> None:
    allowance = Allowance()
    for _ in range(10_000):
        allowance.plain(4)
    rounds = 0
    while allowance.open(4):
        allowance.tried(4, gained=1.0, took=1.5)
        rounds += 1
    assert rounds == BEGIN / 0.5 + 1


def test_once_closed_it_takes_time_to_be_open_again_and_other_sizes_of_load_stay_open() -> None:
    allowance = closed(9)
    assert not allowance.open(8)
    assert not allowance.open(15)
    assert allowance.open(7)
    assert allowance.open(16)
    rounds = 0
    while not allowance.open(9):
        allowance.plain(9)
        rounds += 1
    assert REOPEN / SHARE <= rounds <= (REOPEN + 0.5) / SHARE


def test_a_dear_beginning_is_given_some_rounds_to_pay() -> None:
    allowance = closed()
    while not allowance.open(9):
        allowance.plain(9)
    allowance.tried(9, gained=1.8, took=8.0, usual=False)
    for _ in range(4):
        allowance.tried(9, gained=1.0, took=1.2)
        assert allowance.open(9)
    allowance.tried(9, gained=1.0, took=1.2)
    allowance.tried(9, gained=1.0, took=1.2)
    assert not allowance.open(9)


def test_beginnings_that_are_never_won_back_end_it_whatever_other_rounds_win() -> None:
    """As where streams are short: every fourth round some drafter begins."""
    allowance, rounds = Allowance(), 0
    while allowance.open(16):
        allowance.tried(16, gained=1.5, took=1.4)
        for _ in range(3):
            allowance.tried(16, gained=1.5, took=2.0, usual=False)
        rounds += 4
        assert rounds < 3 * GRACE


def test_a_round_that_only_had_features_to_send_wins_nothing() -> None:
    allowance = closed()
    for _ in range(50):
        allowance.tried(9, gained=1.0, took=0.8, usual=False)
    assert not allowance.open(9)


def reopened(allowance: Allowance, forgone: float, load: int = 9) -> int:
    """Plain rounds until drafts may be tried again."""
    rounds = 0
    while not allowance.open(load):
        allowance.plain(load, forgone=forgone)
        rounds += 1
    return rounds


def test_what_evidence_says_wins_is_tried_again_sooner() -> None:
    assert reopened(closed(), 0.2) < reopened(closed(), 0.05) < reopened(closed(), 0.0) / 2


@pytest.mark.parametrize("forgone", [0.2, 0.6])
def test_evidence_that_comes_to_nothing_is_believed_less_each_time(forgone: float) -> None:
    """As where drafters' first rounds lose what the others win."""
    allowance, waits = closed(), []
    for _ in range(8):
        waits.append(reopened(allowance, forgone))
        for _ in range(10):  # before drafts begin again
            allowance.plain(9, forgone=forgone)
        while allowance.open(9):
            allowance.tried(9, gained=1.0, took=1.3, usual=False)
    assert waits == sorted(waits)
    assert waits[-1] > 0.5 * REOPEN / SHARE


def test_rounds_that_win_restore_the_belief() -> None:
    allowance = closed()
    for _ in range(6):
        reopened(allowance, 0.2)
        while allowance.open(9):
            allowance.tried(9, gained=1.0, took=1.3)
    late = reopened(allowance, 0.2)
    for _ in range(40):
        allowance.tried(9, gained=1.6, took=1.4)
    while allowance.open(9):
        allowance.tried(9, gained=1.0, took=1.3)
    assert reopened(allowance, 0.2) < late / 2
