"""Where steps of some size go slower or faster than the rest: log corrections by number of tokens, which fade.

A bucket's correction is a weighted median of its last deviations, halved in weight every `HALF_LIFE` steps, among a
fixed weight of zeros. So nothing is believed before it was seen several times, one spike or a burst of three is never
believed, and what was believed is given up when the bucket is not seen again: a size once thought slow gets another
try, in which it is judged by new steps and not by the old ones. A size thought fast gets its tries anyway, so that is
believed sixteen times as long.
"""

from __future__ import annotations

from bisect import bisect

import numpy as np

from dspark.costs.model import Seconds

__all__ = ["BUCKETS", "Corrections", "bucket_of"]

BUCKETS = np.array(sorted({1.0, *(2.0**k for k in range(1, 14)), *(3.0 * 2**k for k in range(12))}))
"""Centres, in tokens: 1, 2, 3, 4, 6, 8, 12 …"""

HALF_LIFE, FAST_HALF_LIFE = 64.0, 1024.0  # steps, of what was slower and of what was faster than the rest
KEPT = 16  # deviations of a bucket
ZEROS = 5.0  # weight of "no deviation", in fresh deviations
BAND = 0.42, 0.58  # of the weight in order: averaged, so that one deviation more changes little

_LOG_CENTRES = np.log(BUCKETS)
_EDGES = np.sqrt(BUCKETS[:-1] * BUCKETS[1:]).tolist()


def bucket_of(tokens: float) -> int:
    """The bucket whose centre is nearest, in log."""
    return bisect(_EDGES, tokens)


class Corrections:
    """Deviations by bucket. The clock counts steps, of any bucket."""

    def __init__(self) -> None:
        self._values = np.zeros((len(BUCKETS), KEPT + 1))  # the last is "no deviation"
        self._stamps = np.full((len(BUCKETS), KEPT), -np.inf)
        self._weights = np.full((len(BUCKETS), KEPT + 1), ZEROS)
        self._next = [0] * len(BUCKETS)

    def add(self, bucket: int, deviation: float, now: int) -> None:
        """One more log deviation; the bucket's oldest goes."""
        place = self._next[bucket]
        self._next[bucket] = (place + 1) % KEPT
        self._values[bucket, place] = deviation
        self._stamps[bucket, place] = now

    def at(self, now: int) -> Seconds:
        """(buckets,) log corrections."""
        found = np.zeros(len(BUCKETS))
        used = np.flatnonzero(self._stamps[:, 0] > -np.inf)
        if len(used):
            weights = self._weights[used]
            values = self._values[used]
            lasting = np.where(values[:, :KEPT] < 0, FAST_HALF_LIFE, HALF_LIFE)
            weights[:, :KEPT] = np.exp2((self._stamps[used] - now) / lasting)
            found[used] = _centres(values, weights)
        return found

    @staticmethod
    def between(corrections: Seconds, log_tokens: Seconds) -> Seconds:
        """Log corrections of any numbers of tokens, on lines between the centres."""
        return np.interp(log_tokens, _LOG_CENTRES, corrections)


def _centres(values: Seconds, weights: Seconds) -> Seconds:
    """(rows,) means of the middle band of the weight."""
    order = values.argsort(axis=1)
    rows = np.arange(len(values))[:, None]
    values, weights = values[rows, order], weights[rows, order]
    ends = weights.cumsum(axis=1)
    low, high = (share * ends[:, -1:] for share in BAND)
    inside = np.clip(ends, low, high) - np.clip(ends - weights, low, high)
    centres: Seconds = (inside * values).sum(1) / (high - low)[:, 0]
    return centres
