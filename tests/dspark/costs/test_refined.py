"""Costs that follow real steps: outliers, drift, exploration, single sizes."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dspark.costs import CostModel, CostProfile, Point, Refined
from dspark.costs.corrections import BUCKETS, bucket_of

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = (2, 5, 8, 13, 16, 24, 40, 64, 100)


def true(tokens: float, context: float) -> float:
    return 0.02 + 0.001 * tokens + 2e-7 * tokens * context


def make() -> Refined:
    points = tuple(Point(t, c, true(t, c)) for t in TOKENS for c in (64, 512, 2048))
    return Refined(CostModel(CostProfile("verify", "f", points, 0.0)))


def noise(seed: int, count: int) -> NDArray[np.float64]:
    """As on a shared processor: log-normal, with a heavy tail to the right."""
    random = np.random.default_rng(seed)
    return np.exp(random.normal(0, 0.05, count) + (random.random(count) < 0.12) * random.exponential(0.5, count))


def run(refined: Refined, factors: Sequence[float] | NDArray[np.float64], size: Callable[[int], int]) -> None:
    for index, factor in enumerate(factors):
        refined.observe(size(index), 300, factor * true(size(index), 300))


def mixed(index: int) -> int:
    return SIZES[(index * 5) % len(SIZES)]


def fixed(index: int) -> int:
    return 16


def worst(refined: Refined, factor: float = 1.0) -> float:
    """Largest relative error of any prediction, the machine being so much slower than profiled."""
    errors = [abs(refined.predict(t, c) / (factor * true(t, c)) - 1) for t in range(1, 129) for c in (64, 300, 2000)]
    return max(errors)


def test_before_any_step_the_profile_counts() -> None:
    refined = make()
    assert worst(refined) < 1e-9
    assert refined.ratio == 1.0
    assert refined.steps == 0
    assert refined.table(128, 300) == pytest.approx(refined.model.table(128, 300))


@pytest.mark.parametrize("size", [mixed, fixed])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("before", [0, 3, 60])
@pytest.mark.parametrize("seed", range(8))
def test_slow_outliers_change_little_and_nothing_lasting(
    size: Callable[[int], int], count: int, before: int, seed: int
) -> None:
    factors = noise(seed, before + 50)
    spiked, clean = make(), make()
    run(spiked, factors[:before], size)
    run(clean, factors[:before], size)
    for _ in range(count):  # at one batch size, on top of what comes otherwise
        spiked.observe(16, 300, 20 * true(16, 300))
        clean.observe(16, 300, true(16, 300))
    for index, factor in enumerate(factors[before:]):
        change = spiked.table(128, 300) / clean.table(128, 300) - 1
        assert abs(change).max() < 0.10, index
        for refined in (spiked, clean):
            refined.observe(size(index), 300, factor * true(size(index), 300))
    change = spiked.table(128, 300) / clean.table(128, 300) - 1
    assert abs(change).max() < 0.04


@pytest.mark.parametrize("size", [mixed, fixed])
@pytest.mark.parametrize("factor", [2.0, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(0, 40, 5))
def test_a_machine_that_changes_is_followed_within_25_steps_and_back(
    size: Callable[[int], int], factor: float, seed: int
) -> None:
    refined = make()
    run(refined, noise(seed, 60), size)
    run(refined, factor * noise(seed + 1, 25), size)
    assert worst(refined, factor) < 0.15
    assert refined.ratio == pytest.approx(factor, rel=0.15)
    run(refined, factor * noise(seed + 2, 60), size)
    assert worst(refined, factor) < 0.15
    run(refined, noise(seed + 3, 25), size)
    assert worst(refined) < 0.15


def test_a_machine_that_starts_at_another_speed_is_followed_too() -> None:
    refined = make()
    run(refined, 1.7 * noise(3, 25), mixed)
    assert worst(refined, 1.7) < 0.15


def test_one_size_that_is_slow_is_learned_and_no_other_suffers() -> None:
    refined = make()
    for index, factor in enumerate(noise(1, 300)):
        tokens = mixed(index)
        refined.observe(tokens, 300, factor * true(tokens, 300) * (3.0 if tokens == 24 else 1.0))
    assert refined.predict(24, 300) == pytest.approx(3 * true(24, 300), rel=0.15)
    for tokens in (2, 5, 8, 12, 16, 40, 64, 100):
        assert refined.predict(tokens, 300) == pytest.approx(true(tokens, 300), rel=0.1)
    assert refined.predict(20, 300) > 1.2 * true(20, 300)  # beside it


def test_a_condemned_size_recovers_though_nobody_chooses_it() -> None:
    refined = make()
    for index, factor in enumerate(noise(2, 200)):
        tokens = 24 if index % 3 == 0 else mixed(index)
        refined.observe(tokens, 300, factor * true(tokens, 300) * (4.0 if tokens == 24 else 1.0))
    assert refined.predict(24, 300) > 3 * true(24, 300)
    others = [size for size in SIZES if size != 24]
    after = []
    for index, factor in enumerate(noise(3, 150)):
        refined.observe(others[index % 8], 300, factor * true(others[index % 8], 300))
        after.append(refined.predict(24, 300) / true(24, 300))
    assert after[20] > 2.5  # not forgotten at once
    assert after[149] == pytest.approx(1.0, abs=0.1)
    for _ in range(4):  # tried again, it is judged by what it does now
        refined.observe(24, 300, true(24, 300))
    run(refined, noise(4, 30), mixed)
    assert refined.predict(24, 300) == pytest.approx(true(24, 300), rel=0.1)


def test_a_condemned_size_whose_cause_stays_is_condemned_again() -> None:
    refined = make()
    for index, factor in enumerate(noise(5, 400)):
        tokens = mixed(index) if index < 100 or index > 260 or mixed(index) != 24 else 16
        refined.observe(tokens, 300, factor * true(tokens, 300) * (4.0 if tokens == 24 else 1.0))
    assert refined.predict(24, 300) > 3 * true(24, 300)


def test_context_counts_as_profiled() -> None:
    refined = make()
    for index, factor in enumerate(noise(6, 60)):
        context = (64, 700, 2000)[index % 3]
        refined.observe(32, context, 1.5 * factor * true(32, context))
    for context in (64, 300, 1000, 2000):
        assert refined.predict(32, context) == pytest.approx(1.5 * true(32, context), rel=0.08)
    assert refined.predict(64, 2000) > 1.2 * refined.predict(64, 64)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_what_no_clock_says_is_passed_over(seconds: float) -> None:
    refined = make()
    refined.observe(8, 300, seconds)
    refined.observe(0, 300, 1.0)
    assert refined.steps == 0


def test_fixed_and_marginal_seconds_are_the_line_around_recent_steps() -> None:
    refined = make()
    run(refined, [2.0] * 40, fixed)
    expected = 2 * 0.001 + 2 * 2e-7 * 300
    assert refined.marginal_seconds == pytest.approx(expected, rel=0.1)
    assert refined.fixed_seconds == pytest.approx(0.04, rel=0.1)
    for tokens in (1, 16, 32):
        line = refined.fixed_seconds + tokens * refined.marginal_seconds
        assert line == pytest.approx(refined.predict(tokens, 300), rel=0.1)


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=9), st.lists(st.floats(1e-4, 10.0), max_size=30))
@settings(deadline=None)
def test_the_line_is_never_negative_and_the_table_is_what_is_predicted(
    seconds: list[float], steps: list[float]
) -> None:
    points = tuple(Point(3 * k + 1, 64, value) for k, value in enumerate(seconds))
    refined = Refined(CostModel(CostProfile("draft", "", points, 0.0)))
    for index, value in enumerate(steps):
        refined.observe(1 + index % 40, 64 * (index % 3), value)
    assert refined.fixed_seconds >= 0
    assert refined.marginal_seconds >= 0
    table = refined.table(50, 100)
    assert np.isfinite(table).all()
    assert (table > 0).all()
    assert table[0] == pytest.approx(table[1])
    assert table[[1, 17, 50]] == pytest.approx([refined.predict(tokens, 100) for tokens in (1, 17, 50)])


def test_buckets() -> None:
    assert BUCKETS[:8].tolist() == [1, 2, 3, 4, 6, 8, 12, 16]
    assert all(bucket_of(centre) == index for index, centre in enumerate(BUCKETS))
    assert BUCKETS[bucket_of(100_000)] == 8192
