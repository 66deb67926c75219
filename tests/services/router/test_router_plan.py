"""Verify lengths and prompt pieces: pure functions, so properties over all inputs."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from services.router.plan import Room, level, plan, wanted

ROOMS = st.lists(st.builds(Room, st.integers(0, 16), st.integers(1, 300), st.none() | st.integers(0, 20)), max_size=40)


@given(rooms=ROOMS, verify_length=st.integers(0, 16), budget=st.integers(0, 200))
def test_lengths_stay_within_every_bound(rooms: list[Room], verify_length: int, budget: int) -> None:
    lengths = plan(rooms, verify_length=verify_length, budget=budget)
    assert len(lengths) == len(rooms)
    assert sum(lengths) <= budget
    for room, length in zip(rooms, lengths, strict=True):
        assert 0 <= length <= min(verify_length, room.proposed)
        assert length < room.left  # a round emits one more than it accepts
        assert room.cap is None or length <= room.cap


@given(rooms=ROOMS, verify_length=st.integers(0, 16))
def test_with_rows_enough_every_sequence_gets_all_it_may(rooms: list[Room], verify_length: int) -> None:
    free = plan(rooms, verify_length=verify_length, budget=10_000)
    for room, length in zip(rooms, free, strict=True):
        assert length == min(room.proposed, wanted(room.left, room.cap, verify_length))


@given(rooms=ROOMS, verify_length=st.integers(0, 16), budget=st.integers(0, 200))
def test_more_rows_shorten_nobody(rooms: list[Room], verify_length: int, budget: int) -> None:
    less = plan(rooms, verify_length=verify_length, budget=budget)
    more = plan(rooms, verify_length=verify_length, budget=budget + 1)
    assert sum(more) >= sum(less)
    assert min(more, default=0) >= min(less, default=0)


@given(rooms=ROOMS, verify_length=st.integers(0, 16), budget=st.integers(0, 60))
def test_a_plan_sees_no_token(rooms: list[Room], verify_length: int, budget: int) -> None:
    """Admission must not anticipate tokens: a room holds counts and nothing else."""
    assert all(field.type in {"int", "int | None"} for field in dataclasses.fields(Room))
    assert plan(rooms, verify_length=verify_length, budget=budget) == plan(
        iter(rooms), verify_length=verify_length, budget=budget
    )


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
    assert level([], 10) == []


def test_the_last_token_wants_no_drafts() -> None:
    assert wanted(1, None, 5) == 0
    assert wanted(3, None, 5) == 2
    assert wanted(100, 0, 5) == 0
    assert wanted(100, 3, 5) == 3
