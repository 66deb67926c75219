"""What is timed when: budgets, rounds, kept profiles, against a clock of the test's own."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dspark.costs import CostModel, Point
from dspark.costs.files import read_profile, write_profile
from dspark.costs.measuring import check, measure, obtain
from dspark.costs.profile import CostProfile


class Machine:
    """Steps of known cost, and a clock that they move. The `slow` calls take twenty times as long."""

    def __init__(self, *, first: float = 1.0, slow: range = range(0)) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []
        self._first = first
        self._slow = slow
        self.factor = 1.0

    def clock(self) -> float:
        return self.now

    def step(self, tokens: int, context: int) -> float:
        seconds = self.factor * (0.01 * tokens + 1e-5 * context)
        if (tokens, context) not in self.calls:
            seconds *= self._first
        if len(self.calls) in self._slow:
            seconds *= 20
        self.calls.append((tokens, context))
        self.now += seconds + 0.001  # preparations
        return seconds


SHAPES = [(tokens, context) for context in (64, 512) for tokens in (1, 2, 4, 8)]


def test_every_shape_is_warmed_up_and_then_the_median_of_five() -> None:
    machine = Machine(first=9.0)
    points = measure(SHAPES, machine.step, budget_seconds=100, clock=machine.clock)
    assert {(p.tokens, p.context) for p in points} == set(SHAPES)
    assert all(p.seconds == pytest.approx(0.01 * p.tokens + 1e-5 * p.context) for p in points)
    assert len(machine.calls) == 6 * len(SHAPES) + 1


def test_a_burst_falls_on_one_sample_of_many_points() -> None:
    machine = Machine(slow=range(11, 11 + 2 * len(SHAPES)))  # two whole rounds
    points = measure(SHAPES, machine.step, budget_seconds=100, clock=machine.clock)
    assert all(p.seconds == pytest.approx(0.01 * p.tokens + 1e-5 * p.context) for p in points)


def test_what_would_go_over_the_budget_is_left_out() -> None:
    machine = Machine()
    shapes = [(2**k, 64) for k in range(10)]
    points = measure(shapes, machine.step, budget_seconds=8, clock=machine.clock)
    assert [p.tokens for p in points] == [1, 2, 4, 8, 16, 32, 64]
    assert machine.now < 8


def test_a_slow_machine_still_learns_what_rows_cost() -> None:
    machine = Machine()
    shapes = [(2**k, context) for k in range(10) for context in (64, 512)]
    points = measure(shapes, machine.step, budget_seconds=1e-9, clock=machine.clock)
    assert [(p.tokens, p.context) for p in points] == [(1, 64), (4, 64), (16, 64), (64, 64)]
    assert len(machine.calls) == 1 + 2 * len(points)
    assert CostModel(CostProfile("verify", "f", points, 0.0)).predict(32, 64) == pytest.approx(0.32064)


def test_what_tells_most_comes_first() -> None:
    machine = Machine()
    shapes = [(tokens, context) for context in (64, 512, 2048) for tokens in (1, 2, 3, 4, 6, 8, 12, 16)]
    measure(shapes, machine.step, budget_seconds=1000, clock=machine.clock)
    first = machine.calls[1 : 1 + len(shapes)]
    assert first[:3] == [(1, 64), (4, 64), (16, 64)]
    assert set(first[3:8]) == {(2, 64), (8, 64), (1, 512), (4, 512), (16, 512)}
    assert sorted(first) == sorted(shapes)


def test_large_sizes_come_after_small_ones() -> None:
    machine = Machine()
    shapes = [(tokens, 64) for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    measure(shapes, machine.step, budget_seconds=1000, clock=machine.clock)
    assert machine.calls[1 : 1 + len(shapes)] == [(t, 64) for t in (1, 4, 16, 64, 2, 8, 32, 256, 128)]


def test_a_machine_that_slows_down_meanwhile_bounds_the_time_all_the_same() -> None:
    machine = Machine()

    def step(tokens: int, context: int) -> float:
        machine.factor = 50.0 if len(machine.calls) > len(SHAPES) + 1 else 1.0
        return machine.step(tokens, context)

    points = measure(SHAPES, step, budget_seconds=9.0, clock=machine.clock)
    assert len(points) == len(SHAPES)
    assert len(machine.calls) < 4 * len(SHAPES)


def test_kept_profiles_are_taken_and_others_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    machine = Machine()
    assert obtain("verify", "f", "off", SHAPES, machine.step, budget_seconds=9) is None
    assert obtain("verify", "f", "auto", [], machine.step, budget_seconds=9) is None
    made = obtain("verify", "f", "auto", SHAPES, machine.step, budget_seconds=9)
    assert made is not None
    assert read_profile("f") == made
    calls = len(machine.calls)
    with capture_logs() as logs:
        assert obtain("verify", "f", "auto", SHAPES, machine.step, budget_seconds=9) == made
    assert len(machine.calls) - calls == 8  # two points: a warm-up and three each
    assert logs == []
    again = obtain("verify", "f", "measure", SHAPES, machine.step, budget_seconds=9)
    assert again is not None
    assert again.made_at > made.made_at
    assert read_profile("f") == again


def test_a_kept_profile_that_is_far_off_is_said_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    machine = Machine()
    points = tuple(Point(t, c, 0.01 * t + 1e-5 * c) for t, c in SHAPES)
    kept = CostProfile("verify", "f", points, 0.0)
    write_profile(kept)
    machine.factor = 1.8
    assert check(kept, SHAPES, machine.step) == pytest.approx(1.8)
    machine.factor = 2.5
    with capture_logs() as logs:
        assert obtain("verify", "f", "auto", SHAPES, machine.step, budget_seconds=9) == kept
    assert [(entry["log_level"], entry["ratio"]) for entry in logs] == [("warning", 2.5)]


def test_a_kept_profile_that_was_measured_beside_other_work_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    machine = Machine()
    write_profile(CostProfile("verify", "f", tuple(Point(t, c, 0.01 * t + 1e-5 * c) for t, c in SHAPES), 0.0))
    machine.factor = 0.3
    again = obtain("verify", "f", "auto", SHAPES, machine.step, budget_seconds=9)
    assert again is not None
    assert again.made_at > 0
    assert read_profile("f") == again


@pytest.mark.parametrize(("seconds", "whole"), [(9.0, True), (0.1, False)])
def test_a_kept_profile_that_was_cut_short_is_replaced_where_the_rest_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, whole: bool
) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    machine = Machine()
    points = tuple(Point(t, c, 0.01 * t + 1e-5 * c) for t, c in SHAPES if (t, c) not in {(2, 64), (8, 64)})
    write_profile(CostProfile("verify", "f", points, 0.0))
    found = obtain("verify", "f", "auto", SHAPES, machine.step, budget_seconds=seconds)
    assert found is not None
    assert (len(found.points) == len(SHAPES)) == whole
    assert (found.made_at > 0.0) == whole
