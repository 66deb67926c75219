"""Synthetic timings and measurements for the statistics of benchmarks."""

from dataclasses import replace

from dspark.benchmarking.figures import Figures, figures_of
from dspark.benchmarking.load import Run, Timing
from dspark.benchmarking.plan import Cell
from dspark.benchmarking.summary import Measured
from dspark.errors import Unavailable
from dspark.events import Speculation


def timing(index: int, submitted: float, *arrivals: float, tokens: int = 1, error: str = "") -> Timing:
    """A request whose every arrival brings so many tokens."""
    return Timing(
        index, submitted, tuple((moment, tokens) for moment in arrivals), error=Unavailable(error) if error else None
    )


def with_counts(timing: Timing, rounds: int, verified: int, accepted: int, missed: int = 0) -> Timing:
    counts = Speculation(
        enabled=True, rounds=rounds, drafted=verified, verified=verified, accepted=accepted, missed_rounds=missed
    )
    return replace(timing, speculation=counts)


EMPTY = figures_of(Run(1, (), 0.0, 0.0))


def measured(
    policy: str,
    repeat: int,
    tokens_per_second: float | None,
    speed: float | None = None,
    *,
    concurrency: int = 1,
    outcomes: tuple[int | None, ...] = (),
) -> Measured:
    figures: Figures = replace(
        EMPTY, requests=2, tokens_per_second=tokens_per_second, speed_p50=speed or tokens_per_second
    )
    return Measured(Cell(repeat, concurrency, policy, 0), 0.0, figures, outcomes)
