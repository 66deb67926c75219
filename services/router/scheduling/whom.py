"""Whom to draft for: decided before anything is drafted, from earlier rounds only, so under any sampling mode.

Drafting costs its own seconds, by the number of requests. Where the target is saturated few drafts are verified, and
drafting for those whose drafts would be cut anyway only delays the step. What is verified of the blocks once they are
there is `plan`'s affair.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from services.router.scheduling.plan import Bools, Floats, Ints, curve

__all__ = ["whom_to_draft"]

EXHAUSTIVE = 12  # counts of requests up to which every one is tried
COARSE = 10  # counts tried above, evenly in ratio
FINE = 4  # and between the neighbours of the best
NEAR = 0.02  # of the best: as many as come so close are drafted for, since who comes and goes costs rounds of its own


def whom_to_draft(
    predicted: Floats,
    verify_seconds: Floats,
    draft_seconds: Floats,
    base_rows: int,
    hidden: float = 0.0,
    *,
    base_tokens: float | None = None,
) -> Bools:
    """(R,) which requests to draft for, maximising τ / (T_verify + unhidden T_draft) but for what `NEAR` leaves.

    Requests are ordered by what their drafts would add over the price of a row in the plan that drafts for all, and the
    count is searched globally. With each count the verify lengths are the best ones by the predictions.

    Args:
        predicted: (R, any) what each draft of the requests' next blocks is expected to bring, prefix survivals bounded
            by `limits`, the first one first, and behind them what alternatives to these are.
        verify_seconds: T over the step's rows, as for `plan`.
        draft_seconds: T_draft over the number of requests drafted for; its last value holds beyond its end.
        base_rows: rows of the step without drafts.
        hidden: seconds of drafting that other work hides, 0 where the verifier waits for the drafts.
        base_tokens: tokens of the step without drafts; R unless given.
    """
    able = np.flatnonzero(predicted[:, 0] > 0) if predicted.shape[1] else np.zeros(0, np.int64)
    chosen = np.zeros(len(predicted), np.bool_)
    if not len(able) or base_rows >= len(verify_seconds) - 1:
        return chosen
    tokens = float(len(predicted)) if base_tokens is None else base_tokens
    room = len(verify_seconds) - 1 - base_rows
    flat = predicted[able].ravel()
    falling = np.argsort(-flat)[: np.count_nonzero(flat > 0)]  # sorted once, filtered for each count
    survival, request = flat[falling], falling // predicted.shape[1]

    def goodput(place: Ints, count: int) -> tuple[float, float]:
        """Θ with the first `count` by place drafted for, and the price of a row at its best plan."""
        ordered = survival[(place < count)[request]][:room]
        gained, taken = curve(ordered, verify_seconds, base_rows, tokens, _unhidden(draft_seconds, count, hidden))
        theta = gained / taken
        best = int(np.argmax(theta))
        return float(theta[best]), float(ordered[best - 1]) if best else 1.0

    price = goodput(np.arange(len(able)), len(able))[1]
    order = _by_gain(predicted[able], price)
    place = np.argsort(order)
    tried = {count: goodput(place, count)[0] for count in _counts(len(able))}
    if len(able) > EXHAUSTIVE:
        best = max(tried, key=tried.__getitem__)
        tried |= {count: goodput(place, count)[0] for count in _between(sorted(tried), best)}
    chosen[able[order[: _as_many(tried)]]] = True
    return chosen


def _as_many(tried: Mapping[int, float]) -> int:
    """The greatest count whose Θ is near the best and no worse than nobody's; 0 where that is the best."""
    best = max(tried, key=lambda count: (tried[count], -count))
    least = max((1 - NEAR) * tried[best], tried[0])
    return max(count for count in tried if count and tried[count] >= least) if best else 0


def _unhidden(draft_seconds: Floats, count: int, hidden: float) -> float:
    return max(0.0, float(draft_seconds[min(count, len(draft_seconds) - 1)]) - hidden) if count else 0.0


def _by_gain(rows: Floats, price: float) -> Ints:
    """Requests by falling surplus of their drafts over the price of a row, then by their whole expected gain."""
    surplus = np.maximum(rows - price, 0.0).sum(axis=1)
    return np.lexsort((-rows.sum(axis=1), -surplus))


def _counts(most: int) -> list[int]:
    """0, 1, … up to all: every count of few, some of many."""
    if most <= EXHAUSTIVE:
        return list(range(most + 1))
    return [0, *np.unique(np.geomspace(1, most, COARSE).round().astype(int)).tolist()]


def _between(counts: list[int], best: int) -> list[int]:
    """Further counts on both sides of the best, up to its neighbours."""
    at = counts.index(best)
    low, high = counts[max(0, at - 1)], counts[min(len(counts) - 1, at + 1)]
    sides = (np.linspace(low, best, FINE // 2 + 2)[1:-1], np.linspace(best, high, FINE // 2 + 2)[1:-1])
    return sorted({round(float(c)) for side in sides for c in side} - set(counts))
