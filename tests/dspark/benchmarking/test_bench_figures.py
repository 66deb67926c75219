"""A cell's figures from synthetic timings."""

import dataclasses

import pytest
from support.benchmarks import timing, with_counts

from dspark.benchmarking.figures import Window, figures_of, percentile, steady_window, user_speeds
from dspark.benchmarking.load import Run

# Two users. The second waits for its first token until 2; the first finds nothing left at 8.
LOOP = Run(
    2,
    (
        timing(0, 0.0, 1.0, 2.0, 3.0, 4.0),
        timing(1, 0.0, 2.0, 3.0, 4.0, 5.0, 6.0),
        timing(2, 4.0, 4.5, 5.5, 6.5, 7.5, 8.0),
        timing(3, 6.0, 7.0, 9.0, 10.0),
    ),
    ran_out=8.0,
    seconds=10.0,
)


def test_the_steady_window_is_from_all_decoding_to_the_first_running_out() -> None:
    assert steady_window(LOOP) == Window(2.0, 8.0)
    figures = figures_of(LOOP)
    assert figures.window_seconds == 6.0
    # What comes at its beginning is not in it, what comes at its end is.
    assert figures.window_tokens == 2 + 4 + 5 + 1
    assert figures.tokens_per_second == 2.0
    assert (figures.tokens, figures.seconds, figures.requests, figures.errors) == (17, 10.0, 4, 0)


def test_one_user_alone_is_measured_from_its_first_token_to_its_last() -> None:
    run = Run(1, (timing(0, 0.0, 1.0, 2.0), timing(1, 2.0, 3.0, 4.0)), ran_out=4.0, seconds=4.0)
    figures = figures_of(run)
    assert (figures.window_tokens, figures.window_seconds, figures.tokens_per_second) == (3, 3.0, 1.0)


def test_without_a_window_there_is_no_speed_but_there_are_counts() -> None:
    # The first user has run out before the second has a token.
    late = with_counts(timing(1, 0.0, 3.0, 4.0), rounds=4, verified=8, accepted=2, missed=1)
    run = Run(2, (timing(0, 0.0, 1.0, 2.0), late), ran_out=2.0, seconds=4.0)
    figures = figures_of(run)
    assert steady_window(run) is None
    assert figures.tokens_per_second is figures.speed_p50 is figures.window_seconds is None
    assert (figures.tau, figures.verify_length, figures.wasted, figures.missed_share) == (1.5, 2.0, 1.5, 0.25)


def test_an_empty_cell_says_nothing() -> None:
    for run in (Run(2, (), 0.0, 0.0), Run(1, (timing(0, 0.0, error="gone"),), 0.1, 0.1)):
        figures = figures_of(run)
        values = (figures.tokens_per_second, figures.speed_p50, figures.first_token_p50, figures.tau, figures.wasted)
        assert set(values) == {None}
        assert figures.tokens == figures.rounds == 0
        assert figures.error == ("gone" if run.timings else "")
        assert figures.errors == len(run.timings)


def test_a_users_first_request_that_failed_does_not_hold_up_the_window() -> None:
    failed = timing(1, 0.0, error="gone")
    run = dataclasses.replace(LOOP, timings=(LOOP.timings[0], failed, *LOOP.timings[2:]))
    assert steady_window(run) == Window(1.0, 8.0)
    assert figures_of(run).errors == 1


def test_speeds_of_users_are_those_within_the_window() -> None:
    # 1 token/s each, half a second faster for the third; the fourth has a single arrival in the window.
    assert user_speeds(LOOP.timings, Window(2.0, 8.0)) == [1.0, 1.0, 4 / 3.5]
    assert user_speeds([timing(0, 0, 1.0, 2.0, 4.0, tokens=3)], Window(0.0, 9.0)) == [2.0]
    # A piece of less than half of the arrivals is left out, and a request that failed.
    assert user_speeds([timing(0, 0, 1.0, 2.0, 3.0, 4.0, 5.0)], Window(0.0, 2.5)) == []
    assert user_speeds([timing(0, 0, 1.0, 2.0, error="gone")], Window(0.0, 9.0)) == []
    # All in one moment is no speed.
    assert user_speeds([timing(0, 0, 1.0, 1.0)], Window(0.0, 9.0)) == []


def test_first_tokens_are_those_after_the_opening_rush() -> None:
    assert figures_of(LOOP).first_token_p50 == pytest.approx(0.75)  # 0.5 and 1.0, not 1 and 2
    rush = dataclasses.replace(LOOP, timings=LOOP.timings[:2])
    assert figures_of(rush).first_token_p50 == 1.5


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, None), ([3.0], 0.99, 3.0), ([2.0, 1.0], 0.5, 1.5), ([1.0, 2.0, 3.0], 0.1, 1.2), ([1.0, 9.0], 1.0, 9.0)],
)
def test_percentile(values: list[float], share: float, expected: float | None) -> None:
    assert percentile(values, share) == (None if expected is None else pytest.approx(expected))
