"""One cell's figures from its timings. Pure functions of them.

*Steady window*: from the moment at which every user has had the first token of a first request to the moment at which
the first user finds nothing left to ask. Before it prompts pile up that would never again come all at once, after it
fewer users run than the cell is named for; neither says anything of this concurrency. First requests may be cut short
(`plan.Plan`): they count as the tokens that they are, not as anybody's speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dspark.benchmarking.load import Run, Timing
from dspark.events import Speculation

__all__ = ["Figures", "Window", "figures_of", "percentile", "steady_window", "user_speeds"]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a run, in its seconds: what comes at `begin` is not in it, what comes at `end` is."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin

    def __contains__(self, moment: float) -> bool:
        return self.begin < moment <= self.end


@dataclass(frozen=True, slots=True)
class Figures:
    """What one cell measured; None where it has nothing to say (no window, no rounds, no request that succeeded).

    Attributes:
        requests, errors: how many were made, how many of them failed; `error` is what the first failure said.
        tokens, seconds: of the whole run. window_tokens, window_seconds: of the steady window.
        tokens_per_second: of all users together, in the steady window.
        speed_p50, speed_p90: tokens a second of a user while decoding, in the steady window: what half of the requests
            have or exceed, and what nine of ten do.
        first_token_p50, first_token_p99: seconds from asking to the first token, of requests made once another had
            ended; of all where there are no such.
        tau: tokens a round, the bonus token included. verify_length: drafts and alternatives verified a request
            and round.
        wasted: drafts verified and not kept, a round. missed_share: share of the rounds that had to do without a
            proposal although they wanted one.
        rounds, drafted, verified, accepted, missed_rounds: of all requests, added up.
        cached_tokens: prompt tokens found in a prefix cache; where there are any, first tokens came early.
    """

    requests: int
    errors: int
    error: str
    tokens: int
    seconds: float
    window_tokens: int
    window_seconds: float | None
    tokens_per_second: float | None
    speed_p50: float | None
    speed_p90: float | None
    first_token_p50: float | None
    first_token_p99: float | None
    tau: float | None
    verify_length: float | None
    wasted: float | None
    missed_share: float | None
    rounds: int
    drafted: int
    verified: int
    accepted: int
    missed_rounds: int
    cached_tokens: int
    drafter: str


def figures_of(run: Run) -> Figures:
    """All figures of a run."""
    failures = [timing.error for timing in run.timings if timing.error is not None]
    counts = Speculation.total(timing.speculation for timing in run.timings)
    window = steady_window(run)
    inside = sum(count for timing in run.timings for moment, count in timing.arrivals if window and moment in window)
    speeds = user_speeds(_uncut(run), window) if window else []
    firsts = _first_tokens(run, window)
    return Figures(
        requests=len(run.timings),
        errors=len(failures),
        error=str(failures[0]) if failures else "",
        tokens=sum(timing.tokens for timing in run.timings),
        seconds=run.seconds,
        window_tokens=inside,
        window_seconds=window.seconds if window else None,
        tokens_per_second=inside / window.seconds if window else None,
        speed_p50=percentile(speeds, 0.5),
        speed_p90=percentile(speeds, 0.1),
        first_token_p50=percentile(firsts, 0.5),
        first_token_p99=percentile(firsts, 0.99),
        tau=counts.tau if counts.rounds else None,
        verify_length=counts.verify_length if counts.rounds else None,
        wasted=_share(counts.rejected, counts.rounds),
        missed_share=_share(counts.missed_rounds, counts.rounds),
        rounds=counts.rounds,
        drafted=counts.drafted,
        verified=counts.verified,
        accepted=counts.accepted,
        missed_rounds=counts.missed_rounds,
        cached_tokens=sum(timing.cached_tokens for timing in run.timings),
        drafter=counts.drafter,
    )


def steady_window(run: Run) -> Window | None:
    """The steady window; None where the first user ran out before the last had a token, or nobody got any."""
    firsts = [timing.arrivals[0][0] for timing in run.timings[: run.concurrency] if timing.arrivals]
    if not firsts or max(firsts) >= run.ran_out:
        return None
    return Window(max(firsts), run.ran_out)


def user_speeds(timings: Iterable[Timing], window: Window) -> list[float]:
    """Tokens a second of each request between its first and its last arrival within the window.

    Of requests that the window cuts, those count that have at least half of their arrivals in it: shorter pieces are
    mostly noise, and leaving out all that are cut would prefer short answers.
    """
    speeds = []
    for timing in timings:
        inside = [arrival for arrival in timing.arrivals if window.begin <= arrival[0] <= window.end]
        if timing.error is None and len(inside) >= max(2, len(timing.arrivals) / 2):
            seconds = inside[-1][0] - inside[0][0]
            if seconds > 0:
                speeds.append(sum(count for _, count in inside[1:]) / seconds)
    return speeds


def _uncut(run: Run) -> list[Timing]:
    """Without users' first requests but the last one's, which is whole, where there are others."""
    return [timing for timing in run.timings if timing.index >= run.concurrency - 1]


def _first_tokens(run: Run, window: Window | None) -> list[float]:
    """Seconds to the first token, without those of the opening rush where others are there."""
    answered = [timing for timing in run.timings if timing.arrivals]
    later = [timing for timing in answered if timing.index >= run.concurrency]
    settled = [timing for timing in later if window and timing.submitted >= window.begin]
    return [timing.arrivals[0][0] - timing.submitted for timing in settled or later or answered]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that a share (0 to 1) of the values does not exceed, interpolated; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
