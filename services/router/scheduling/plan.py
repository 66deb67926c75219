"""How much of each drafted block is verified: the hardware-aware prefix scheduler (DSpark §3.2.2, §5.2, Appendix A).

Pure functions of arrays. Where survivals come from is `survival`'s affair, what a step costs that of `dspark.costs`,
who is drafted for that of `whom`, and which rule a request follows that of `policies`.

A verify length is chosen to maximise Θ = τ / (T(B) + D): expected tokens of the step over its seconds, where B counts
all its rows and D is the draft time that no other work hides. Three searches do it, and the sampling mode decides which
may be used. With rejection sampling a draft token must be admitted without regard to its own value, but c_{k+1} already
depends on x_k: a search that looks at it before deciding on x_k prefers tokens that confident ones follow, and changes
the output. What each search reads before it decides on (r, k):

* `early_stop`: survivals that are at least a_{r,k}, hence of tokens before x_k only;
* `asynchronous`: those, and a capacity made from older rounds;
* `freshest`: everything. Allowed where the output is a function of seed and target whatever was admitted: coupled
  sampling, and temperature 0.

The first two visit the drafts in an order in which each is reached only after those that its survival was made of have
been admitted. So they leave not only each request's distribution alone but also their independence of each other.
Ties are broken by position, then by request, never by a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FREE",
    "Bools",
    "Floats",
    "Ints",
    "Plan",
    "asynchronous",
    "choose",
    "curve",
    "descending",
    "early_stop",
    "freshest",
    "limits",
    "survival_of",
    "trim",
]

Floats: TypeAlias = NDArray[np.floating[Any]]  # float64; wider, as numpy's own operations are typed so
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

FREE = -1  # in `forced`: this request's length is for the search to find


@dataclass(frozen=True, slots=True)
class Plan:
    """What is verified in one step.

    Attributes:
        lengths: (R,) draft tokens of each request.
        tokens: expected tokens of the step, τ.
        seconds: predicted for it, unhidden draft time included.
        cut: the least that a row brings which the search admitted; infinite where it admitted none.
        alternatives: (R, n) to which drafts an alternative is verified; None: to none.
    """

    lengths: Ints
    tokens: float
    seconds: float
    cut: float = np.inf
    alternatives: Bools | None = None

    @property
    def goodput(self) -> float:
        """Θ, expected tokens a second."""
        return self.tokens / self.seconds


# ---------------------------------------------------------------- inputs


def limits(left: Ints, block: int, *, caps: Ints | None = None, speculation: Bools | None = None) -> Ints:
    """(R,) draft tokens that each request may have verified, known before anything is drafted.

    Args:
        left: (R,) tokens that it may still emit. A round emits one more than it accepts.
        block: draft tokens proposed a round.
        caps: (R,) the requests' own limits.
        speculation: (R,) False where the request asked for none.
    """
    most = np.minimum(left - 1, block if caps is None else np.minimum(caps, block))
    return np.maximum(0, most if speculation is None else np.where(speculation, most, 0)).astype(np.int64)


def survival_of(confidences: Floats, most: Ints | None = None) -> Floats:
    """(R, n) prefix survivals a_{r,j} = ∏_{i≤j} c_{r,i}: non-increasing, 0 beyond `most` and what was proposed.

    Args:
        confidences: (R, n) c_{r,j}; 0 or NaN where nothing was proposed.
        most: (R,) from `limits`.
    """
    usable = confidences > 0
    if most is not None:
        usable &= np.arange(confidences.shape[1]) < most[:, None]
    return np.asarray(np.cumprod(np.where(usable, np.minimum(confidences, 1.0), 0.0), axis=1), np.float64)


def descending(survival: Floats, room: int) -> Floats:
    """The at most `room` greatest survivals of drafts that exist, falling: prefix order, as rows do not increase."""
    flat = survival.ravel()
    ordered = np.sort(flat[flat > 0])[::-1]
    return ordered[: max(0, room)]


def curve(
    ordered: Floats, seconds: Floats, base_rows: int, base_tokens: float, unhidden: float
) -> tuple[Floats, Floats]:
    """τ and T + D, both (K + 1,), with the first 0 … K of the ordered drafts admitted."""
    tokens = np.full(len(ordered) + 1, float(base_tokens))
    tokens[1:] += np.cumsum(ordered)
    first = min(base_rows, len(seconds) - 1)
    return tokens, seconds[first : first + len(ordered) + 1] + unhidden


# ---------------------------------------------------------------- the three searches


def early_stop(
    survival: Floats, seconds: Floats, base_rows: int, unhidden: float = 0.0, *, base_tokens: float | None = None
) -> Plan:
    """Algorithm 1: admits drafts by falling survival and stops before the first one with which Θ drops.

    Lossless under rejection sampling with no knowledge but the present blocks, at the price of stopping at the first
    cliff of a jagged cost table.

    Args:
        survival: (R, n) from `survival_of`, a row for every request that decodes in this step.
        seconds: T over the step's rows, from 0 up to the most that the step may have.
        base_rows: rows without drafts: R anchors, pieces of prompts, other routers' rows.
        unhidden: seconds of drafting that this round pays for.
        base_tokens: tokens of the step without drafts; R unless given. Rows in prefill cost and gain nothing.
    """
    tokens = len(survival) if base_tokens is None else base_tokens
    ordered = descending(survival, len(seconds) - 1 - base_rows)
    gained, taken = curve(ordered, seconds, base_rows, tokens, unhidden)
    theta = gained / taken
    drops = theta[1:] < theta[:-1]
    count = int(np.argmax(drops)) if drops.any() else len(ordered)
    return _planned(survival, ordered, count, gained, taken)


def freshest(
    survival: Floats,
    seconds: Floats,
    base_rows: int,
    unhidden: float = 0.0,
    *,
    base_tokens: float | None = None,
    alternatives: Floats | None = None,
) -> Plan:
    """The best plan by the present survivals, wherever on the cost table it lies. Biases rejection sampling.

    Arguments as of `early_stop`; `alternatives` (R, n) from `alternatives.worth`, ranked among the drafts.
    """
    tokens = len(survival) if base_tokens is None else base_tokens
    both = survival if alternatives is None else np.concatenate([survival, alternatives], axis=1)
    ordered = descending(both, len(seconds) - 1 - base_rows)
    gained, taken = curve(ordered, seconds, base_rows, tokens, unhidden)
    return _planned(both, ordered, int(np.argmax(gained / taken)), gained, taken, survival.shape[1])


def asynchronous(
    survival: Floats,
    before: Floats,
    seconds: Floats,
    base_rows: int,
    unhidden: float = 0.0,
    *,
    base_tokens: float | None = None,
) -> Plan:
    """Fills a capacity, the best one by older survivals wherever it lies, by the present ranking (DSpark §5.2).

    Args:
        survival: (R, n) of the present blocks.
        before: (any, n) survivals that were known before the present blocks were drawn: of earlier blocks, or
            predictions, for as many requests. It may be bounded by `limits`, never by how much was proposed now, as a
            drafter may end a block by what it drew.
        seconds: as of `early_stop`, like the following.
        base_rows: without drafts.
        unhidden: seconds of drafting.
        base_tokens: without drafts.
    """
    tokens = len(survival) if base_tokens is None else base_tokens
    room = len(seconds) - 1 - base_rows
    older, taken = curve(descending(before, room), seconds, base_rows, tokens, unhidden)
    capacity = int(np.argmax(older / taken))
    flat = survival.ravel()
    flat = flat[flat > 0]
    count = min(capacity, len(flat))
    if not count:
        return Plan(np.zeros(len(survival), np.int64), tokens, float(taken[0]))
    cut = float(np.partition(flat, len(flat) - count)[len(flat) - count])
    above = flat[flat > cut]
    gained = tokens + float(above.sum()) + (count - len(above)) * cut
    return Plan(_lengths(_admitted(survival, cut, count)), gained, float(taken[count]), cut)


def _planned(
    both: Floats, ordered: Floats, count: int, gained: Floats, taken: Floats, width: int | None = None
) -> Plan:
    """The plan of the first `count` drafts and alternatives; these are behind the first `width` columns."""
    if not count:
        return Plan(np.zeros(len(both), np.int64), float(gained[0]), float(taken[0]))
    cut = float(ordered[count - 1])
    admitted = _admitted(both, cut, count)
    beside = admitted[:, width:] if width is not None and width < both.shape[1] else None
    return Plan(_lengths(admitted[:, :width]), float(gained[count]), float(taken[count]), cut, beside)


def _admitted(survival: Floats, cut: float, count: int) -> Bools:
    """The first `count` by falling survival, of which `cut` is the last, then column by column, then by request."""
    admitted = survival > cut
    tied = np.flatnonzero((survival == cut).T)[: count - int(np.count_nonzero(admitted))]
    admitted[tied % len(survival), tied // len(survival)] = True
    return admitted


def _lengths(admitted: Bools) -> Ints:
    return np.asarray(np.count_nonzero(admitted, axis=1), np.int64)


def trim(lengths: Ints, room: int) -> Ints:
    """Lengths cut to `room` drafts in all, filled position by position: the longest are cut first."""
    if int(lengths.sum()) <= room:
        return lengths
    width = int(lengths.max(initial=0))
    wanted = np.arange(width)[:, None] < lengths  # (n, R)
    kept = np.flatnonzero(wanted)[: max(0, room)]
    return np.bincount(kept % len(lengths), minlength=len(lengths)).astype(np.int64)


# ---------------------------------------------------------------- which search


def choose(
    survival: Floats,
    seconds: Floats,
    base_rows: int,
    unhidden: float = 0.0,
    *,
    rejection: bool,
    before: Floats | None = None,
    forced: Ints | None = None,
    base_tokens: float | None = None,
    alternatives: Floats | None = None,
) -> Plan:
    """The best plan that the batch's sampling modes allow.

    One request that samples by rejection at a temperature above 0 puts the whole batch under its rule: the requests
    share one ranking, and what the others' drafts show would otherwise decide on its tokens together with its own.
    Then the capacity comes from `before`; where nothing is known from before, Algorithm 1's early stop needs nothing.

    Args:
        survival: (R, n) of the present blocks.
        seconds: as of `early_stop`, like the following.
        base_rows: without drafts.
        unhidden: seconds of drafting.
        rejection: whether any request with drafts samples by rejection at a temperature above 0.
        before: (R, n) as of `asynchronous`, row by row those of the same requests.
        forced: (R,) lengths settled already, `FREE` elsewhere: requests explored this round or under a static rule.
            They take rows first and count in Θ, and must themselves be non-anticipating.
        base_tokens: without drafts.
        alternatives: as of `freshest`; never where the batch is under the rule of rejection, nor to settled lengths.
    """
    if rejection:
        alternatives = None
    if forced is None or not (forced >= 0).any():
        return _search(survival, seconds, base_rows, unhidden, rejection, before, base_tokens, alternatives)
    settled = _settled(survival, forced, len(seconds) - 1 - base_rows)
    free = forced < 0
    tokens = len(survival) if base_tokens is None else base_tokens
    found = _search(
        np.where(free[:, None], survival, 0.0),
        seconds,
        base_rows + int(settled.sum()),
        unhidden,
        rejection,
        None if before is None else np.where(free[:, None], before, 0.0),
        tokens + _prefix_sum(survival, settled),
        None if alternatives is None else np.where(free[:, None], alternatives, 0.0),
    )
    return replace(found, lengths=found.lengths + settled)


def _search(
    survival: Floats,
    seconds: Floats,
    rows: int,
    unhidden: float,
    rejection: bool,
    before: Floats | None,
    tokens: float | None,
    alternatives: Floats | None,
) -> Plan:
    if not rejection:
        return freshest(survival, seconds, rows, unhidden, base_tokens=tokens, alternatives=alternatives)
    if before is None:
        return early_stop(survival, seconds, rows, unhidden, base_tokens=tokens)
    return asynchronous(survival, before, seconds, rows, unhidden, base_tokens=tokens)


def _settled(survival: Floats, forced: Ints, room: int) -> Ints:
    proposed = np.count_nonzero(survival > 0, axis=1)
    return trim(np.minimum(np.maximum(forced, 0), proposed), room)


def _prefix_sum(survival: Floats, lengths: Ints) -> float:
    return float(survival[np.arange(survival.shape[1]) < lengths[:, None]].sum())
