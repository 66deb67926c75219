"""The searches against brute force, and what bounds a plan."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.scheduling.plan import (
    FREE,
    Floats,
    asynchronous,
    choose,
    early_stop,
    freshest,
    limits,
    survival_of,
    trim,
)
from services.router.scheduling.whom import whom_to_draft


def brute_force(survival: Floats, seconds: Floats, base_rows: int, unhidden: float) -> tuple[float, int]:
    """The greatest Θ over all vectors of lengths, and the fewest drafts that reach it."""
    best, count = -1.0, 0
    for lengths in itertools.product(range(survival.shape[1] + 1), repeat=len(survival)):
        rows = base_rows + sum(lengths)
        if rows >= len(seconds):
            continue
        tokens = len(survival) + sum(float(survival[r, :n].sum()) for r, n in enumerate(lengths))
        theta = tokens / (seconds[rows] + unhidden)
        if theta > best * (1 + 1e-12):
            best, count = theta, sum(lengths)
        elif theta > best * (1 - 1e-12):
            count = min(count, sum(lengths))
    return best, count


def jagged(generator: np.random.Generator, rows: int) -> Floats:
    return 1 + np.cumsum(generator.random(rows) ** 3)


@pytest.mark.parametrize("seed", range(40))
def test_freshest_is_the_best_there_is(seed: int) -> None:
    generator = np.random.default_rng(seed)
    survival = survival_of(generator.random((3, 3)) ** 0.3)
    seconds, prefill, unhidden = jagged(generator, 11 + seed % 6), seed % 3, 0.3 * (seed % 2)
    plan = freshest(survival, seconds, 3 + prefill, unhidden)
    assert plan.goodput == pytest.approx(brute_force(survival, seconds, 3 + prefill, unhidden)[0])
    rows = 3 + prefill + int(plan.lengths.sum())
    assert plan.seconds == pytest.approx(seconds[rows] + unhidden)


@pytest.mark.parametrize("seed", range(40))
def test_capacity_is_the_best_for_older_survivals(seed: int) -> None:
    generator = np.random.default_rng(seed)
    now, before = (survival_of(generator.random((3, 3)) ** 0.3) for _ in range(2))
    seconds = jagged(generator, 13)
    plan = asynchronous(now, before, seconds, 3)
    assert plan.lengths.sum() == brute_force(before, seconds, 3, 0.0)[1]
    left_out = [now[r, n] for r, n in enumerate(plan.lengths) if n < 3]
    assert all(now[r, :n].min(initial=1) >= max(left_out, default=0) for r, n in enumerate(plan.lengths))


def test_flat_costs_verify_everything_and_steep_ones_nothing() -> None:
    survival = survival_of(np.full((4, 5), 0.7))
    for search in (early_stop, freshest):
        assert search(survival, np.ones(100), 4).lengths.tolist() == [5] * 4
        assert search(survival, np.arange(100.0) ** 2 + 1, 4).lengths.tolist() == [0] * 4
    assert asynchronous(survival, survival, np.ones(100), 4).lengths.tolist() == [5] * 4
    assert asynchronous(survival, survival, np.arange(100.0) ** 2 + 1, 4).lengths.tolist() == [0] * 4


def test_a_cliff_stops_early_stop_only() -> None:
    survival = survival_of(np.full((2, 6), 0.95))
    seconds = np.where(np.arange(20) < 5, 1.0, 1.4)  # a cliff after two drafts, flat beyond
    assert early_stop(survival, seconds, 2).lengths.sum() == 2
    assert freshest(survival, seconds, 2).lengths.sum() == 12
    assert asynchronous(survival, survival, seconds, 2).lengths.sum() == 12


def test_rows_in_prefill_cost_and_gain_nothing() -> None:
    survival = survival_of(np.full((2, 3), 0.5))
    plan = freshest(survival, np.arange(1.0, 200.0), 2 + 90)
    assert plan.tokens == pytest.approx(2 + survival.sum())  # beside 90 rows another one is cheap
    assert plan.seconds == 1 + 92 + 6
    assert freshest(survival, np.arange(1.0, 200.0), 2).lengths.sum() == 0  # alone it costs more than it gains


def test_limits() -> None:
    got = limits(
        np.array([1, 3, 100, 100, 100]),
        5,
        caps=np.array([9, 9, 9, 2, 9]),
        speculation=np.array([True, True, True, True, False]),
    )
    assert got.tolist() == [0, 2, 5, 2, 0]
    survival = survival_of(np.full((5, 5), 0.9), got)
    assert np.count_nonzero(survival, axis=1).tolist() == got.tolist()
    assert freshest(survival, np.ones(100), 5).lengths.tolist() == got.tolist()


def test_survivals_stop_where_nothing_was_proposed() -> None:
    got = survival_of(np.array([[0.5, 0.0, 0.9], [np.nan, 0.9, 0.9], [0.5, 0.5, 1.5]]))
    assert got.tolist() == [[0.5, 0, 0], [0, 0, 0], [0.5, 0.25, 0.25]]


def test_ties_go_by_position_then_request() -> None:
    survival = np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.0], [0.9, 0.5, 0.2]])
    before = np.array([[1.0, 1.0, 1.0], [1.0, 0, 0], [0, 0, 0]])
    seconds = np.where(np.arange(20) <= 7, 1.0, 100.0)
    assert asynchronous(survival, before, seconds, 3).lengths.tolist() == [2, 1, 1]


@given(
    requests=st.integers(0, 6),
    block=st.integers(0, 5),
    base=st.integers(0, 30),
    rows=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["fresh", "early", "before"]),
)
@settings(deadline=None)
def test_plans_keep_within_bounds(requests: int, block: int, base: int, rows: int, seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    most = generator.integers(0, block + 1, requests)
    survival = survival_of(generator.random((requests, block)), most)
    before = survival_of(generator.random((requests, block))) if kind == "before" else None
    forced = np.where(generator.random(requests) < 0.3, block, FREE)
    plan = choose(survival, jagged(generator, rows), base, rejection=kind != "fresh", before=before, forced=forced)
    assert (plan.lengths <= most).all()
    assert plan.lengths.sum() <= max(0, rows - 1 - base)
    assert plan.tokens == pytest.approx(requests + sum(survival[r, :n].sum() for r, n in enumerate(plan.lengths)))
    if rows - 1 - base >= requests * block:
        assert (plan.lengths[forced >= 0] == most[forced >= 0]).all()


def test_trim_cuts_the_longest_first() -> None:
    assert trim(np.array([5, 1, 3]), 6).tolist() == [3, 1, 2]
    assert trim(np.array([5, 1, 3]), 9).tolist() == [5, 1, 3]
    assert trim(np.array([5, 1, 3]), -1).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- whom to draft for


def whom_by_force(predicted: Floats, verify: Floats, draft: Floats, hidden: float) -> float:
    best = 0.0
    for mask in itertools.product([False, True], repeat=len(predicted)):
        chosen = np.where(np.array(mask)[:, None], predicted, 0.0)
        unhidden = max(0.0, draft[sum(mask)] - hidden) if any(mask) else 0.0
        best = max(best, freshest(chosen, verify, len(predicted), unhidden).goodput)
    return best


@pytest.mark.parametrize("seed", range(30))
def test_whom_to_draft_is_near_the_best_choice(seed: int) -> None:
    generator = np.random.default_rng(seed)
    predicted = survival_of(np.clip(generator.beta(3, 2, (6, 1)) + generator.normal(0, 0.1, (6, 4)), 0.01, 0.99))
    verify, draft = jagged(generator, 31), 0.1 + 0.15 * np.arange(7)
    hidden = 0.3 * (seed % 3)
    chosen = whom_to_draft(predicted, verify, draft, 6, hidden)
    unhidden = max(0.0, draft[chosen.sum()] - hidden) if chosen.any() else 0.0
    got = freshest(np.where(chosen[:, None], predicted, 0), verify, 6, unhidden).goodput
    assert got >= 0.97 * whom_by_force(predicted, verify, draft, hidden)


def test_nobody_is_drafted_for_past_saturation() -> None:
    predicted = survival_of(np.full((64, 7), 0.7))
    steep = 0.01 * np.arange(1.0, 600.0)
    assert not whom_to_draft(predicted, steep, 0.05 + 0.01 * np.arange(65), 64).any()
    assert whom_to_draft(predicted, np.ones(600), 0.001 * np.arange(65), 64).all()
    assert not whom_to_draft(predicted, np.ones(64), np.zeros(65), 64).any()  # the step is full already


def test_the_promising_are_drafted_for() -> None:
    predicted = survival_of(np.repeat([[0.9], [0.02], [0.9], [0.02], [0.0]], 5, axis=1))
    chosen = whom_to_draft(predicted, 1 + 0.02 * np.arange(50), 0.08 * np.arange(6), 5)
    assert chosen.tolist() == [True, False, True, False, False]


def test_hidden_drafting_is_free() -> None:
    predicted = survival_of(np.full((4, 5), 0.3))
    verify, draft = 1 + 0.01 * np.arange(50), 0.5 + 0.1 * np.arange(5)
    assert not whom_to_draft(predicted, verify, draft, 4).any()
    assert whom_to_draft(predicted, verify, draft, 4, hidden=1.0).all()
