"""Verify lengths under a fixed rule, and prompt pieces: pure functions, so properties over all inputs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.router.scheduling.plan import limits
from services.router.scheduling.policies import Facts, Fixed
from services.router.shares import level

ROOMS = st.lists(st.tuples(st.integers(0, 16), st.integers(1, 300), st.integers(0, 20)), max_size=40)


def fixed(rooms: list[tuple[int, int, int]], length: int, budget: int) -> tuple[list[int], list[int]]:
    """Verify lengths, and what each room would allow: (proposed, left, cap) each."""
    proposed, left, cap = (np.array(column, np.int64) for column in (zip(*rooms, strict=True) if rooms else ([],) * 3))
    most = limits(left, 16, caps=cap)
    confidences = np.where(np.arange(16) < proposed[:, None], 0.5, 0.0).reshape(len(rooms), 16)
    facts = Facts(confidences, most, np.ones(len(rooms) + budget + 1), base_rows=len(rooms))
    return Fixed(length).outcome(facts).verify.tolist(), np.minimum(np.minimum(most, proposed), length).tolist()


@given(rooms=ROOMS, length=st.integers(0, 16), budget=st.integers(0, 200))
def test_lengths_stay_within_every_bound(rooms: list[tuple[int, int, int]], length: int, budget: int) -> None:
    lengths, _ = fixed(rooms, length, budget)
    assert sum(lengths) <= budget
    for (proposed, left, cap), chosen in zip(rooms, lengths, strict=True):
        assert 0 <= chosen <= min(length, proposed, cap)
        assert chosen < left  # a round emits one more than it accepts


@given(rooms=ROOMS, length=st.integers(0, 16))
def test_with_rows_enough_every_sequence_gets_all_it_may(rooms: list[tuple[int, int, int]], length: int) -> None:
    lengths, allowed = fixed(rooms, length, 10_000)
    assert lengths == allowed


@given(rooms=ROOMS, length=st.integers(0, 16), budget=st.integers(0, 200))
def test_more_rows_shorten_nobody(rooms: list[tuple[int, int, int]], length: int, budget: int) -> None:
    less, more = fixed(rooms, length, budget)[0], fixed(rooms, length, budget + 1)[0]
    assert all(before <= after for before, after in zip(less, more, strict=True))


@given(demands=st.lists(st.integers(0, 5000), max_size=40), budget=st.integers(-5, 3000))
def test_level_is_max_min_fair(demands: list[int], budget: int) -> None:
    shares = level(demands, budget)
    assert all(0 <= share <= demand for share, demand in zip(shares, demands, strict=True))
    assert sum(shares) == min(max(0, budget), sum(demands))
    cut = [share for share, demand in zip(shares, demands, strict=True) if share < demand]
    if cut:  # whoever is cut has no less than anybody, but for what does not divide
        assert min(cut) >= max(shares) - 1


def test_short_prompts_are_done_before_long_ones() -> None:
    assert level([4000, 10, 4000, 30], 256) == [108, 10, 108, 30]
    assert level([5, 5, 5], 2) == [1, 1, 0]
