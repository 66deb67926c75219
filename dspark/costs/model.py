"""From measured points to the cost of any step: a monotonic envelope over tokens and context, and lines between.

The envelope is the largest monotonic surface below the points: a step counts for no more than any larger one was
measured at. On a shared processor noise only ever adds time, and adds it to several repeats in a row, so that a point
too high is common and one too low is not. Mean errors (95 % quantile) over 18 points of a line with a flat start,
each the median of five under log-normal noise (5 %) with an exponential tail (12 % of steps, mean 0.5 in log), and one
point in ten measured during a burst: this envelope 4 % (20 %), isotonic regression 8 % (43 %), running maximum 22 %
(120 %); without bursts 2.5 %, 2.4 % and 3.1 % (`benchmarks/costs.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dspark.costs.profile import CostProfile, Point

__all__ = ["CostModel", "Seconds"]

Seconds = NDArray[np.float64]


class CostModel:
    """Seconds of a step by tokens and mean context length; never decreasing in either.

    Attributes:
        profile: the points it was made from.
        tokens: (n,) measured numbers of tokens, ascending.
        contexts: (m,) measured contexts, ascending.
        envelope: (m, n) seconds there; what was not measured is filled from the next smaller context.
    """

    def __init__(self, profile: CostProfile) -> None:
        self.profile = profile
        self.tokens = np.array(sorted({point.tokens for point in profile.points}), dtype=np.float64)
        self.contexts = np.array(sorted({point.context for point in profile.points}), dtype=np.float64)
        self.envelope = _lower(_lower(_surface(profile.points, self.tokens, self.contexts), axis=1), axis=0)
        slopes = [_last_slope(self.tokens, row) for row in self.envelope]
        self._slopes = np.maximum.accumulate(slopes)  # beyond the points, too, nothing falls with context

    def predict(self, tokens: float, context: float) -> float:
        """Seconds of a step. Past the largest point the last slope goes on; below the smallest, nothing is saved."""
        return float(self._at(np.array([float(tokens)]), context)[0])

    def table(self, max_tokens: int, context: float) -> Seconds:
        """(max_tokens + 1,) seconds of 0 … max_tokens tokens; a step of none counts as one of one."""
        seconds = self._at(np.arange(max_tokens + 1, dtype=np.float64), context)
        seconds[0] = seconds[1] if max_tokens else self.predict(1, context)
        return seconds

    def _at(self, tokens: Seconds, context: float) -> Seconds:
        row = self._row(context)
        seconds = np.interp(tokens, self.tokens, row)
        if tokens[-1] > self.tokens[-1]:
            seconds += self._between(self._slopes, context) * np.maximum(tokens - self.tokens[-1], 0.0)
        return seconds

    def _row(self, context: float) -> Seconds:
        """(n,) seconds at a context."""
        row = self._between(self.envelope, context)
        return row if context <= self.contexts[-1] else _lower(row, axis=0)

    def _between(self, figures: Seconds, context: float) -> Seconds:
        """What has an entry a context, at any context: on lines between them, and on the last one beyond."""
        contexts = self.contexts
        if len(contexts) == 1 or context <= contexts[0]:
            first: Seconds = figures[0]
            return first
        upper = min(int(np.searchsorted(contexts, context)), len(contexts) - 1)
        share = (context - contexts[upper - 1]) / (contexts[upper] - contexts[upper - 1])
        between: Seconds = figures[upper - 1] + share * (figures[upper] - figures[upper - 1])
        return between


def _lower(seconds: Seconds, axis: int) -> Seconds:
    """The largest non-decreasing values below these."""
    lower: Seconds = np.flip(np.minimum.accumulate(np.flip(seconds, axis), axis), axis)
    return lower


def _surface(points: Iterable[Point], tokens: Seconds, contexts: Seconds) -> Seconds:
    """(m, n) seconds: each context's own points, and between and beyond them what the others suggest."""
    rows: list[Seconds] = []
    for context in contexts:
        own = _medians(point for point in points if point.context == context)
        known = np.array(sorted(own), dtype=np.float64)
        seconds = _lower(np.array([own[token] for token in sorted(own)]), axis=0)
        rows.append(_filled(tokens, known, seconds, rows[-1] if rows else None))
    return np.stack(rows)


def _medians(points: Iterable[Point]) -> dict[int, float]:
    """Seconds by tokens; of several points at one place the median."""
    found: dict[int, list[float]] = {}
    for point in points:
        found.setdefault(point.tokens, []).append(point.seconds)
    return {tokens: float(np.median(seconds)) for tokens, seconds in found.items()}


def _filled(tokens: Seconds, known: Seconds, seconds: Seconds, smaller: Seconds | None) -> Seconds:
    """A context's seconds at all tokens: beyond its points it goes on as the smaller context does, in proportion."""
    row = np.interp(tokens, known, seconds)
    above, below = tokens > known[-1], tokens < known[0]
    if smaller is None:
        row[above] += _last_slope(known, seconds) * (tokens[above] - known[-1])
        return row
    row[above] *= smaller[above] / np.interp(known[-1], tokens, smaller)
    row[below] *= smaller[below] / np.interp(known[0], tokens, smaller)
    return row


def _last_slope(tokens: Seconds, seconds: Seconds) -> float:
    """Seconds a token at the end of a curve; where it ends flat, those of the whole. A single point is half fixed."""
    if len(tokens) == 1:
        return float(seconds[0] / tokens[0] / 2.0)
    last = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])
    return float(last if last > 0.0 else (seconds[-1] - seconds[0]) / (tokens[-1] - tokens[0]))
