"""Blocks are asked for as long as plans take them, and what was not asked for is no block that ended."""

import numpy as np
import pytest

from services.router.scheduling.histories import Histories
from services.router.scheduling.reach import WHOLE_EVERY, WINDOW, Reach
from services.router.scheduling.survival import Tracker, continued

N = 7


def test_whole_blocks_until_plans_have_been_shorter_for_a_while() -> None:
    reach = Reach()
    for planned in [2] * (WINDOW - 1):
        reach.observe(planned, capped=False)
        assert reach.of(N) == N
    reach.observe(1, capped=False)
    assert reach.of(N) == 3
    assert reach.of(2) == 2
    for _ in range(WINDOW - 1):
        reach.observe(1, capped=False)
    assert reach.of(N) == 2  # the last 2 has left the window


def test_a_plan_that_takes_all_it_can_get_is_given_twice_as_much() -> None:
    reach = Reach()
    for _ in range(WINDOW):
        reach.observe(0, capped=False)
    lengths = []
    for _ in range(4):
        lengths.append(reach.of(N))
        reach.observe(lengths[-1], capped=True)
    assert lengths == [1, 3, 7, 7]


def test_now_and_then_a_round_of_whole_blocks_that_is_not_what_is_usual() -> None:
    reach = Reach()
    whole = 0
    for _ in range(10 * WHOLE_EVERY):
        whole += reach.of(N) == N
        reach.observe(1, capped=False)
    assert 9 <= whole - WINDOW <= 10
    for _ in range(WHOLE_EVERY):
        assert reach.usual(N) == 2
        reach.observe(1, capped=False)


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

    def play(confidences: np.ndarray, asked: int) -> None:
        one, settings = np.array([1]), np.array([number])
        lengths = np.array([asked])
        tracker.observe(settings, confidences, one, one, asked=lengths)
        histories.observe(slots, confidences, one, one, asked=lengths)

    for _ in range(40):
        play(whole, N)
    before = histories.predicted(slots).copy(), tracker.average(np.array([number])).copy()
    for _ in range(200):
        play(short, 2)
    assert histories.predicted(slots) == pytest.approx(before[0], rel=0.1)
    assert tracker.average(np.array([number])) == pytest.approx(before[1], rel=0.25)
    for _ in range(200):
        play(short, N)  # blocks that end are another thing
    assert histories.predicted(slots)[0, 2:].max() < 0.01
