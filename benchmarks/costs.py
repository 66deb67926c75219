"""The choices of `dspark.costs` under simulated noise, and what its tables cost: `python -m benchmarks.costs`.

The noise is that of a shared processor: log-normal (5 %), in 12 % of steps times an exponential tail in log (mean 0.5),
and at start, where the five samples of a point are taken in a row, one point in ten within a burst.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark.costs import CostModel, CostProfile, Point, Refined

Array = NDArray[np.float64]

TOKENS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512], dtype=np.float64)
RANDOM = np.random.default_rng(0)


def noise(count: int) -> Array:
    """(count,) factors."""
    tail = (RANDOM.random(count) < 0.12) * RANDOM.exponential(0.5, count)
    return np.exp(RANDOM.normal(0.0, 0.05, count) + tail)


def main() -> None:
    """Print all of it as JSON."""
    report = {"envelope": envelopes(), "factor": factors(), "microseconds": speed()}
    json.dump(report, sys.stdout, indent=2)
    sys.stdout.write("\n")


# ---------------------------------------------------------------- envelopes


def isotonic(values: Array) -> Array:
    """The non-decreasing values nearest to these."""
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            count, mean = counts.pop(), means.pop()
            means[-1] = (means[-1] * counts[-1] + mean * count) / (counts[-1] + count)
            counts[-1] += count
    return np.repeat(np.array(means), counts)


def envelopes(runs: int = 2000) -> list[dict[str, Any]]:
    """Errors of each envelope of a noisy start-up profile."""
    kinds: dict[str, Callable[[Array], Array]] = {
        "lower": lambda y: np.minimum.accumulate(y[::-1])[::-1],
        "isotonic": isotonic,
        "upper": np.maximum.accumulate,
    }
    truth = np.log(20.0 + 0.1 * TOKENS + 1.2 * np.maximum(0.0, TOKENS - 8.0))
    found = []
    for bursts in (False, True):
        profiles = [truth + np.log(_measured(bursts)) for _ in range(runs)]
        for name, kind in kinds.items():
            errors = np.abs(np.stack([kind(profile) - truth for profile in profiles]))
            row = {"bursts": bursts, "envelope": name, "mean_error": errors.mean(), "p95": np.quantile(errors, 0.95)}
            found.append(row)
    return found


def _measured(bursts: bool) -> Array:
    medians = np.median(noise(5 * len(TOKENS)).reshape(-1, 5), axis=1)
    hit = (RANDOM.random(len(TOKENS)) < 0.1) * RANDOM.exponential(0.6, len(TOKENS))
    factors: Array = medians * np.exp(hit * bursts)
    return factors


# ---------------------------------------------------------------- the machine's factor


def mean(window: Array) -> float:
    """All of it."""
    return float(window.mean())


def median(window: Array) -> float:
    """The one in the middle."""
    return float(np.median(window))


def middle(window: Array) -> float:
    """Mean of the middle half."""
    cut = len(window) // 4
    return float(np.sort(window)[cut : len(window) - cut].mean())


def huber(window: Array) -> float:
    """Huber's mean at 1.5 robust deviations."""
    centre = float(np.median(window))
    spread = 1.48 * float(np.median(np.abs(window - centre))) + 1e-3
    for _ in range(5):
        centre += float(np.clip(window - centre, -1.5 * spread, 1.5 * spread).mean())
    return centre


def factors(runs: int = 400, size: int = 25) -> list[dict[str, Any]]:
    """Each centre of the last `size` logs: spread and bias, what slow steps do to it, steps to follow a doubling."""
    kinds = {"mean": mean, "middle half": middle, "huber": huber, "median": median}
    found = []
    for name, kind in kinds.items():
        series = [np.log(noise(120)) for _ in range(runs)]
        plain = np.array([kind(logs[:size]) for logs in series])
        one, three = (np.array([kind(_slowed(logs[:size], count)) for logs in series]) - plain for count in (1, 3))
        row = {"centre": name, "spread": plain.std(), "bias": plain.mean(), "one": one.max(), "three": three.max()}
        found.append(row | {"steps": float(np.median([_steps_to_follow(logs, kind, size) for logs in series]))})
    return found


def _slowed(logs: Array, count: int) -> Array:
    return np.concatenate([logs[:-count], logs[-count:] + np.log(20.0)])


def _steps_to_follow(logs: Array, kind: Callable[[Array], float], size: int) -> int:
    doubled = logs + np.log(2.0) * (np.arange(len(logs)) >= 60)
    near = (abs(np.exp(kind(doubled[end - size : end])) / 2.0 - 1.0) < 0.15 for end in range(61, 120))
    return 1 + next((steps for steps, reached in enumerate(near) if reached), 60)


# ---------------------------------------------------------------- speed


def speed(repeats: int = 2000) -> dict[str, float]:
    """Median microseconds of what a scheduler calls every round."""
    points = tuple(
        Point(int(tokens), context, 0.02 + 1e-3 * tokens + 1e-7 * tokens * context)
        for tokens in TOKENS
        for context in (64, 512, 2048)
    )
    model = CostModel(CostProfile("verify", "", points, 0.0))
    refined = Refined(model)
    for tokens in RANDOM.choice(TOKENS, 200):
        refined.observe(tokens, 300, model.predict(tokens, 300) * float(noise(1)[0]))
    calls: dict[str, Callable[[], Any]] = {
        "model.table(512)": lambda: model.table(512, 300),
        "refined.table(512)": lambda: refined.table(512, 300),
        "refined.observe": lambda: refined.observe(16, 300, 0.03),
        "refined.observe, fixed_seconds": lambda: _observe_and_fit(refined),
    }
    return {name: _microseconds(call, repeats) for name, call in calls.items()}


def _observe_and_fit(refined: Refined) -> float:
    refined.observe(16, 300, 0.03)
    return refined.fixed_seconds


def _microseconds(call: Callable[[], Any], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return round(float(np.median(took)) * 1e6, 1)


if __name__ == "__main__":
    main()
