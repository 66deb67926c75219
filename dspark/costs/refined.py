"""A cost model that follows the steps that really run: one factor for the machine, corrections by number of tokens.

Everything happens in logs of observed over profiled seconds. On a shared processor their noise has a heavy tail to the
right (preemption, a neighbour's burst) and shifts of the whole machine, so the factor is the median of the last 25.
Simulated (5 % log-normal, 12 % of steps with an exponential tail of mean 0.5; `benchmarks/costs.py`), in per cent:

    of the last 25     spread   bias   one 20x step, most   three, most   steps to follow a doubling within 15 %
    mean                 5.0     5.8        12                36            18
    middle half          1.3     0.9         4                13            16
    Huber                1.5     1.2         4                 6            15
    median               1.5     0.8         2                 4            13

What single sizes deviate by is judged twelve steps later, against the median of the steps on both sides: a median keeps
edges, so a change of the whole machine leaves no trace in the corrections (`corrections`). What is predicted is the
typical step, not the mean with its accidents: those do not depend on what a scheduler chooses.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from dspark.costs.corrections import Corrections, bucket_of
from dspark.costs.model import CostModel, Seconds

__all__ = ["Refined"]

WINDOW = 25  # steps
_STRIDE = 4  # steps after which corrections of single sizes, which fade over dozens, are computed anew
_MIDDLE = WINDOW // 2
_SHORTEST_LINE = 8  # tokens that fixed and marginal seconds are fitted over, at least


class Refined:
    """`CostModel` under real steps. Not monotonic: a size that really is slower than the next larger may show."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._steps = 0
        self._corrections = Corrections()
        self._local = self._corrections.at(0)
        self._residuals: deque[float] = deque(
            [0.0] * WINDOW, WINDOW
        )  # the profile counts until there is something else
        self._buckets: deque[int] = deque([0] * WINDOW, WINDOW)
        self._recent: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._factor = 0.0
        self._line: tuple[float, float] | None = None

    def observe(self, tokens: float, context: float, seconds: float) -> None:
        """A step of that many tokens took so long. What no clock says (nothing, less, infinite) is passed over."""
        if not 0.0 < seconds < math.inf or tokens < 1:
            return
        self._steps += 1
        self._residuals.append(math.log(seconds / self.model.predict(tokens, context)))
        self._buckets.append(bucket_of(tokens))
        self._recent.append((tokens, context))
        if self._steps > _MIDDLE:
            middle = self._residuals[_MIDDLE] - self._centre()
            self._corrections.add(self._buckets[_MIDDLE], middle, self._steps)
        if self._steps % _STRIDE == 0:
            self._local = self._corrections.at(self._steps)
        self._factor = self._centre()
        self._line = None

    def predict(self, tokens: float, context: float) -> float:
        """Seconds of a step, as steps go now."""
        log_tokens = np.log([max(1.0, tokens)])
        local = float(self._corrections.between(self._local, log_tokens)[0])
        return self.model.predict(tokens, context) * math.exp(self._factor + local)

    def table(self, max_tokens: int, context: float) -> Seconds:
        """(max_tokens + 1,) seconds of 0 … max_tokens tokens, as `CostModel.table`."""
        log_tokens = np.log(np.maximum(np.arange(max_tokens + 1), 1))
        local = self._corrections.between(self._local, log_tokens)
        seconds: Seconds = self.model.table(max_tokens, context) * np.exp(self._factor + local)
        return seconds

    @property
    def steps(self) -> int:
        """Steps observed."""
        return self._steps

    @property
    def ratio(self) -> float:
        """Observed over profiled seconds of recent steps, corrections of single sizes apart; 1 is as profiled."""
        return math.exp(self._factor)

    @property
    def fixed_seconds(self) -> float:
        """Of the line through the costs around recent steps, what a step costs before its first token."""
        return self._fitted()[0]

    @property
    def marginal_seconds(self) -> float:
        """Of that line, what each token adds."""
        return self._fitted()[1]

    def _centre(self) -> float:
        """Median of the window, corrections of single sizes taken off."""
        local: list[float] = self._local.tolist()  # plain numbers: sorting 25 takes a fraction of numpy's call
        return sorted(
            residual - local[bucket] for residual, bucket in zip(self._residuals, self._buckets, strict=True)
        )[_MIDDLE]

    def _fitted(self) -> tuple[float, float]:
        if self._line is None:
            self._line = _line(self._around())
        return self._line

    def _around(self) -> Seconds:
        """Seconds of 1 … n tokens, n being twice what recent steps had, at their context."""
        tokens, context = np.mean(self._recent, axis=0) if self._recent else (0.0, float(self.model.contexts[0]))
        return self.table(max(_SHORTEST_LINE, round(2.0 * float(tokens))), float(context))[1:]


def _line(seconds: Seconds) -> tuple[float, float]:
    """Least squares through (1, seconds[0]), (2, seconds[1]) …, intercept and slope both at least 0."""
    tokens = np.arange(1, len(seconds) + 1) - (len(seconds) + 1) / 2.0
    slope = max(0.0, float(tokens @ seconds / (tokens @ tokens)))
    fixed = float(seconds.mean()) - slope * (len(seconds) + 1) / 2.0
    if fixed >= 0.0:
        return fixed, slope
    tokens = np.arange(1, len(seconds) + 1, dtype=np.float64)
    return 0.0, float(tokens @ seconds / (tokens @ tokens))
