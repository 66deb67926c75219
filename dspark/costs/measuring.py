"""When to time which step, so that a profile is honest and done in time. What a step is, workers know.

Points are timed in rounds, each once a round, and not five times in a row: a neighbour's burst of a second or two then
falls on one sample of many points instead of all samples of one, and the median drops it. The first round warms up,
tells what each point costs and leaves out those that would go over the budget. What tells most comes first: powers of
four up to 64 at the shortest context, then by and by longer contexts and sizes between, and larger ones. Measured from
the smallest size on, a busy machine's budget ended at 8 rows of Gemma 3 270M, on a step of the curve whose slope says
nothing of 64; with 256 rows before 8, a burst of other work left 5 points of 25.

A few sizes are timed whatever they take: without them a slow machine's curve would be flat, and a scheduler would
verify everything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import structlog

from dspark.costs.files import alone, read_profile, write_profile
from dspark.costs.model import CostModel
from dspark.costs.profile import CostProfile, Kind, Point

__all__ = ["REPEATS", "Clock", "Shape", "Timer", "check", "measure", "obtain"]

REPEATS = 5
_SHARE = 0.25  # of the budget, for one shape at most
_NEEDED = 64  # tokens: powers of four up to here are timed in any case
CHECK_TOLERANCE = 2.0  # a kept profile may be off by this factor before somebody is told

Shape = tuple[int, int]
"""Tokens and context."""

Timer = Callable[[int, int], float]
"""Runs one step of so many tokens at a context and returns its seconds, preparations left out."""

Clock = Callable[[], float]

_log = structlog.get_logger(__name__)


def obtain(
    kind: Kind, fingerprint: str, choice: str, shapes: Sequence[Shape], timer: Timer, *, budget_seconds: float
) -> CostProfile | None:
    """The profile of this fingerprint: kept, or measured and kept. None where nothing can be or is to be measured.

    `choice`: "auto" takes the kept one and checks it at two points; "measure" measures in any case; "off" does without.
    A kept one that is far above what steps take now was measured beside other work, and is replaced; so is one that
    was cut short.
    """
    if choice == "off" or not shapes:
        return None
    kept = read_profile(fingerprint) if choice == "auto" else None
    with alone(3.0 * budget_seconds):
        whole = kept is not None and not _cut_short(kept, shapes, budget_seconds)
        if kept is not None and whole and check(kept, shapes, timer) * CHECK_TOLERANCE >= 1.0:
            return kept
        began = time.perf_counter()
        points = measure(shapes, timer, budget_seconds=budget_seconds)
    profile = CostProfile(kind, fingerprint, points, time.time())
    write_profile(profile)
    _log.info("costs measured", kind=kind, points=len(points), seconds=round(time.perf_counter() - began, 2))
    return profile


def _cut_short(kept: CostProfile, shapes: Sequence[Shape], seconds: float) -> bool:
    """Whether small sizes are missing at the shortest context that, by its own word, would have taken little time."""
    known = {(point.tokens, point.context) for point in kept.points}
    shortest = min(context for _, context in shapes)
    missing = {shape for shape in shapes if shape[1] == shortest and shape[0] <= _NEEDED} - known
    predict = CostModel(kept).predict
    return bool(missing) and sum(predict(*shape) for shape in missing) < seconds / (REPEATS + 1) * _SHARE


def measure(
    shapes: Sequence[Shape],
    timer: Timer,
    *,
    budget_seconds: float,
    repeats: int = REPEATS,
    clock: Clock = time.perf_counter,
) -> tuple[Point, ...]:
    """The median of `repeats` samples at each shape that fits into the budget.

    No shape gets more than a quarter of it, but powers of four up to 64 at the shortest context are always measured,
    once at least. Where the machine slows down meanwhile, points keep the samples they have.
    """
    deadline = clock() + 1.5 * budget_seconds
    samples = _warm_up(shapes, timer, budget_seconds / (repeats + 1), clock)
    for number in range(repeats):
        for shape, own in samples.items():
            if clock() < deadline or not number:
                own.append(timer(*shape))
    return tuple(Point(*shape, statistics.median(own)) for shape, own in samples.items())


def _warm_up(shapes: Sequence[Shape], timer: Timer, seconds: float, clock: Clock) -> dict[Shape, list[float]]:
    """Run every shape once, as long as all of them together take at most so many seconds; room for their samples."""
    took: dict[Shape, float] = {}  # preparations included
    timer(*min(shapes))  # the very first step pays for more than its shape
    for shape in _telling(shapes):
        known = max((other for other in took if other[0] <= shape[0]), default=None)
        growth = (1.0 + shape[0] / known[0]) / 2.0 if known is not None else 0.0  # half fixed, half by tokens
        expected = took[known] * growth if known is not None else 0.0
        dear = expected > _SHARE * seconds or sum(took.values()) + expected > seconds
        if dear and not _needed(shape, shapes):
            continue
        began = clock()
        timer(*shape)
        took[shape] = clock() - began
    return {shape: [] for shape in sorted(took)}


def _needed(shape: Shape, shapes: Sequence[Shape]) -> bool:
    tokens, context = shape
    shortest = context == min(other for _, other in shapes)
    return shortest and _power_of_four(tokens) and tokens <= _NEEDED


def _power_of_four(tokens: int) -> bool:
    return tokens & (tokens - 1) == 0 and tokens.bit_length() % 2 == 1


def _telling(shapes: Sequence[Shape]) -> list[Shape]:
    """Those that tell most first."""
    contexts = sorted({context for _, context in shapes})

    def rank(shape: Shape) -> tuple[int, Shape]:
        tokens, context = shape
        between = 0 if _power_of_four(tokens) else 1 if tokens & (tokens - 1) == 0 else 2
        return between + contexts.index(context) + 2 * (tokens > _NEEDED), shape

    return sorted(shapes, key=rank)


def check(profile: CostProfile, shapes: Sequence[Shape], timer: Timer) -> float:
    """Time two steps and compare: observed over profiled seconds. Says so where they are far apart, and no more.

    Steps correct what they are predicted by (`refined`), so a profile that is off costs the first seconds only.
    """
    model = CostModel(profile)
    few = min(shapes)
    some = max((shape for shape in sorted(shapes) if shape[0] <= 8 * few[0]), key=lambda shape: shape[0])
    ratios = []
    for shape in (few, some):
        timer(*shape)
        ratios.append(min(timer(*shape) for _ in range(3)) / model.predict(*shape))
    ratio = statistics.geometric_mean(ratios)
    if not 1.0 / CHECK_TOLERANCE <= ratio <= CHECK_TOLERANCE:
        _log.warning(
            "steps do not take what the kept profile says",
            kind=profile.kind,
            fingerprint=profile.fingerprint,
            ratio=round(ratio, 2),
        )
    return ratio
