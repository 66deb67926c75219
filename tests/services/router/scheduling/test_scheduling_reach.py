"""Blocks are as long as their places are worth, and what was not asked for is no block that ended."""

import random
import statistics
from collections.abc import Sequence

import numpy as np
import pytest

from services.router.scheduling.histories import Histories
from services.router.scheduling.reach import ENOUGH, FIRST, KEPT, SETTLED_EVERY, WHOLE_EVERY, Blocks, Reach
from services.router.scheduling.survival import Tracker, continued

N = 7


def seen(
    chance: float, asked: Sequence[int], *, plans: int = N, requests: int | None = None, drafting: float = 0.002
) -> Blocks:
    """A round of such blocks, whose drafts each stand with the same chance; 10 ms beside drafting."""
    lengths = np.array(asked)
    taken = np.arange(N) < np.minimum(lengths, plans)[:, None]
    survival = np.where(taken, chance ** np.arange(1, N + 1), 0.0)
    count = requests or len(lengths)
    return Blocks(survival, lengths, count, drafting, row=0.0, beside=0.01, base=float(count))


def play(
    reach: Reach,
    chance: float,
    rounds: int,
    *,
    requests: int = 4,
    token: float = 0.001,
    plans: int = N,
    noise: float = 0.0,
    row: float = 0.0,
    base: float = 1.0,
) -> list[int]:
    """Rounds with 1 ms for a draft's forward, and so much for a token and for its row; what was asked for in each."""
    drawn, lengths = random.Random(1), []
    for _ in range(rounds):
        length = reach.next(N)
        factor = 1 + noise * drawn.uniform(-1, 1)
        round_ = seen(chance, [length] * requests, plans=plans, drafting=factor * (0.001 + token * length))
        reach.observe(round_._replace(row=row, base=base * requests))
        lengths.append(length)
    return lengths


def rate(length: int, chance: float, token: float) -> float:
    """Tokens a second, by the definition."""
    return sum(chance**k for k in range(length + 1)) / (0.011 + token * length)


@pytest.mark.parametrize(("chance", "token"), [(0.9, 1e-4), (0.9, 1e-3), (0.6, 1e-3), (0.6, 3e-3), (0.3, 1e-3)])
def test_the_length_of_most_tokens_a_second_is_found(chance: float, token: float) -> None:
    lengths = play(Reach(), chance, 300, token=token, noise=0.2)
    assert lengths[:FIRST] == [N] * FIRST
    usual = statistics.mode(lengths[-WHOLE_EVERY:])
    assert rate(usual, chance, token) > 0.96 * max(rate(length, chance, token) for length in range(1, N + 1))
    assert (usual == N) is (chance == 0.9)


def test_drafts_rows_count_as_far_as_plans_take_them() -> None:
    assert statistics.mode(play(Reach(), 0.7, 200, token=1e-5)) == N
    assert statistics.mode(play(Reach(), 0.7, 200, token=1e-5, row=1e-3)[100:]) < N
    assert statistics.mode(play(Reach(), 0.7, 200, token=1e-4, row=1e-3, plans=2)[100:]) == 2


def test_where_others_wait_for_them_blocks_are_shorter() -> None:
    alone, waited_for = (statistics.mode(play(Reach(), 0.6, 300, base=base)[100:]) for base in (1.0, 4.0))
    assert waited_for < alone


def test_rounds_of_fewer_requests_change_no_length_of_more() -> None:
    """One of eight drafted for in a look has eight times the tokens beside its own, and all of the round's."""
    reach, steady = Reach(), Reach()
    for _ in range(300):
        steady.observe(seen(0.6, [steady.next(N)] * 8, drafting=0.002)._replace(base=8.0))
        reach.observe(seen(0.6, [reach.next(N)] * 8, drafting=0.002)._replace(base=8.0))
        reach.observe(seen(0.6, [reach.next(N)], requests=1, drafting=0.002)._replace(base=8.0))
    assert reach.usual(N) == steady.usual(N)


def test_a_round_of_whole_blocks_that_nobody_saw_is_asked_for_again() -> None:
    reach = Reach()
    play(reach, 0.3, 2 * WHOLE_EVERY, plans=1)
    while reach.next(N) < N:
        reach.observe(seen(0.3, [1] * 4, plans=1))
    assert reach.next(N) == N
    reach.observe(seen(0.3, [N] * 4, plans=1, drafting=0.01))
    assert reach.next(N) == 1


def test_where_lengths_cost_the_same_blocks_stay_whole() -> None:
    assert set(play(Reach(), 0.6, 200, token=0.0)) == {N}


def test_places_that_plans_do_not_take_are_worth_nothing() -> None:
    assert set(play(Reach(), 0.9, 200, plans=2, token=1e-4)[40:60]) == {2}


def test_longer_blocks_are_asked_for_again_as_the_text_gets_easier() -> None:
    reach = Reach()
    assert play(reach, 0.3, 100, plans=1, token=1e-4)[-1] == 1
    assert play(reach, 0.95, 8 * WHOLE_EVERY, token=1e-4)[-1] == N


def test_what_a_length_took_is_forgotten_in_time() -> None:
    """Else one that met other work when it was tried would never be tried again."""
    reach = Reach()
    play(reach, 0.6, FIRST + 4)
    for _ in range(ENOUGH):
        reach.observe(seen(0.6, [2] * 4, drafting=1.0))
    lengths = play(reach, 0.6, KEPT + 2 * WHOLE_EVERY)
    assert 2 not in lengths[: KEPT // 2]
    assert lengths[-1] in {2, 4}


def test_a_number_of_requests_that_was_never_timed_changes_nothing_at_first() -> None:
    reach = Reach()
    assert play(reach, 0.3, 101, plans=1)[-1] == 1  # the next time is due after three more
    for requests in (5, 6, 7, 8):
        reach.observe(seen(0.95, [1] * requests, drafting=1e-4))
    assert reach.next(N) == 1


def test_a_cap_on_all_blocks_keeps_nobody_from_choosing() -> None:
    reach = Reach()
    for _ in range(4 * SETTLED_EVERY):
        reach.observe(seen(0.3, [4] * 3, plans=1, drafting=0.005))
    assert reach.next(N) == 1


def test_blocks_of_mixed_lengths_tell_what_places_bring_as_far_as_they_were_asked() -> None:
    reach = Reach()
    for _ in range(4 * SETTLED_EVERY):
        reach.observe(seen(0.5, [N, 1], drafting=0.1))
    assert reach.next(N) == N  # what either takes is not known
    for _ in range(4 * SETTLED_EVERY):
        reach.observe(seen(0.5, [N, N, N, 1], requests=4, drafting=0.02))
    assert reach.usual(N) < N


def test_a_drafter_with_other_blocks_begins_anew() -> None:
    reach = Reach()
    assert play(reach, 0.3, 100, plans=1)[-1] == 1
    reach.observe(Blocks(np.full((1, 4), 0.5), np.array([4]), 1, 0.002, 0.0, 0.01, 1.0))
    assert reach.next(4) == 4
    assert play(reach, 0.9, FIRST + SETTLED_EVERY, token=1e-5) == [N] * (FIRST + SETTLED_EVERY)


def test_now_and_then_a_round_of_whole_blocks_that_is_not_what_is_usual() -> None:
    reach = Reach()
    lengths = play(reach, 0.3, 10 * WHOLE_EVERY, plans=1)
    assert 9 <= lengths[2 * FIRST :].count(N) <= 10
    assert reach.usual(N) == 1


def test_places_behind_what_was_asked_for_are_as_expected() -> None:
    chance = np.array([[0.9, 0.8, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])
    expected = np.array([[0.5, 0.4, 0.2, 0.05]])
    found = continued(chance, np.array([2, 4]), expected)
    assert found[0] == pytest.approx([0.9, 0.8, 0.5, 0.25])
    assert found[1].tolist() == chance[1].tolist()  # asked for in full: the block ended by itself


def test_averages_do_not_sink_because_less_is_asked_for() -> None:
    tracker = Tracker(N)
    number = tracker.setting("coupled", "d")
    histories = Histories(tracker, N)
    slots = np.array([histories.join(number)])
    whole = np.full((1, N), 0.8)
    short = np.where(np.arange(N) < 2, whole, 0.0)

    def look(confidences: np.ndarray, asked: int) -> None:
        one, settings = np.array([1]), np.array([number])
        lengths = np.array([asked])
        tracker.observe(settings, confidences, one, one, asked=lengths)
        histories.observe(slots, confidences, one, one, asked=lengths)

    for _ in range(40):
        look(whole, N)
    before = histories.predicted(slots).copy(), tracker.average(np.array([number])).copy()
    for _ in range(200):
        look(short, 2)
    assert histories.predicted(slots) == pytest.approx(before[0], rel=0.1)
    assert tracker.average(np.array([number])) == pytest.approx(before[1], rel=0.25)
    for _ in range(200):
        look(short, N)  # blocks that end are another thing
    assert histories.predicted(slots)[0, 2:].max() < 0.01
