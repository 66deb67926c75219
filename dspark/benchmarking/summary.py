"""Repeats become medians, neighbours become ratios, curves are compared where they serve equally much. Pure functions.

A *ratio* is a policy's figure over the reference's in the same repeat at the same concurrency: the machine was then as
it was for both. Its median over the repeats is what is reported, with the least and the greatest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from dspark.benchmarking.figures import Figures
from dspark.benchmarking.plan import Cell, Plan

__all__ = ["FIGURES", "Matched", "Measured", "Ratio", "Row", "matched", "same_outputs", "speed_at", "summarise"]

FIGURES = (
    "tokens_per_second",
    "speed_p50",
    "speed_p90",
    "first_token_p50",
    "first_token_p99",
    "tau",
    "verify_length",
    "wasted",
    "missed_share",
)
"""Figures of which medians are taken."""
RATIOS = ("tokens_per_second", "speed_p50")
"""Figures of which ratios are taken."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell, when it began (seconds since the first did), its figures, and what stands for each request's tokens.

    An outcome is None where the request failed.
    """

    cell: Cell
    began: float
    figures: Figures
    outcomes: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of a policy to the reference: one value a repeat that has both."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The greatest."""
        return max(self.values)


@dataclass(frozen=True, slots=True)
class Row:
    """A policy at a concurrency over all repeats: medians by figure (None: nothing was measured) and ratios by figure.

    A figure without any pair has no ratio.
    """

    concurrency: int
    policy: str
    repeats: int
    requests: int
    errors: int
    medians: Mapping[str, float | None]
    ratios: Mapping[str, Ratio]


@dataclass(frozen=True, slots=True)
class Matched:
    """Where the baseline gives `tokens_per_second` in all: each policy's speed a user at that throughput, or None."""

    concurrency: int
    tokens_per_second: float
    speeds: Mapping[str, float | None]
    baseline: str

    def relative(self, policy: str) -> float | None:
        """A policy's speed over the baseline's."""
        ours, base = self.speeds.get(policy), self.speeds.get(self.baseline)
        return ours / base if ours is not None and base else None


def summarise(measured: Sequence[Measured], plan: Plan) -> list[Row]:
    """One row a concurrency and policy, in the plan's order; without those that were never measured."""
    rows = [_row(measured, plan.reference, c, p) for c in plan.concurrencies for p in plan.policies]
    return [row for row in rows if row is not None]


def _row(measured: Sequence[Measured], reference: str, concurrency: int, policy: str) -> Row | None:
    ours = _by_repeat(measured, concurrency, policy)
    base = _by_repeat(measured, concurrency, reference)
    if not ours:
        return None
    ratios = {name: _ratio(ours, base, name) for name in RATIOS}
    return Row(
        concurrency=concurrency,
        policy=policy,
        repeats=len(ours),
        requests=sum(figures.requests for figures in ours.values()),
        errors=sum(figures.errors for figures in ours.values()),
        medians={name: _median(getattr(figures, name) for figures in ours.values()) for name in FIGURES},
        ratios={name: ratio for name, ratio in ratios.items() if ratio is not None},
    )


def _by_repeat(measured: Iterable[Measured], concurrency: int, policy: str) -> dict[int, Figures]:
    wanted = (concurrency, policy)
    return {one.cell.repeat: one.figures for one in measured if (one.cell.concurrency, one.cell.policy) == wanted}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(ours: Mapping[int, Figures], base: Mapping[int, Figures], name: str) -> Ratio | None:
    pairs = [(getattr(ours[repeat], name), getattr(base[repeat], name)) for repeat in sorted(ours) if repeat in base]
    values = tuple(a / b for a, b in pairs if a is not None and b)
    return Ratio(values) if values else None


# ---------------------------------------------------------------- throughput against speed (the paper's Figure 7)


def matched(rows: Sequence[Row], baseline: str) -> list[Matched]:
    """Each policy's speed a user where it serves as many tokens a second as each of the baseline's points."""
    curves = {policy: _curve(rows, policy) for policy in dict.fromkeys(row.policy for row in rows)}
    points = [row for row in rows if row.policy == baseline]
    found = []
    for row in points:
        throughput, speed = row.medians["tokens_per_second"], row.medians["speed_p50"]
        if throughput is None or speed is None:
            continue
        speeds = {policy: speed_at(curve, throughput) for policy, curve in curves.items()}
        found.append(Matched(row.concurrency, throughput, speeds | {baseline: speed}, baseline))
    return found


def _curve(rows: Iterable[Row], policy: str) -> list[tuple[float, float]]:
    pairs = [(r.medians["tokens_per_second"], r.medians["speed_p50"]) for r in rows if r.policy == policy]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def speed_at(curve: Sequence[tuple[float, float]], throughput: float) -> float | None:
    """The speed a user at a throughput, on straight lines between a curve's points in order of concurrency.

    Where the curve comes back to a throughput (a policy that loses when the machine is full), the greatest speed:
    nobody would run it at the other. None outside what was measured: nothing is extrapolated.
    """
    exact = [y for x, y in curve if x == throughput]
    crossed = [
        y0 + (y1 - y0) * (throughput - x0) / (x1 - x0)
        for (x0, y0), (x1, y1) in pairwise(curve)
        if min(x0, x1) < throughput < max(x0, x1)
    ]
    return max(exact + crossed, default=None)


# ---------------------------------------------------------------- exactness


def same_outputs(measured: Sequence[Measured], reference: str) -> tuple[int, int]:
    """How many answers could be compared with the reference's to the same request, and how many had the same tokens."""
    base = {(o.cell.repeat, o.cell.concurrency): o.outcomes for o in measured if o.cell.policy == reference}
    pairs = [
        (ours, theirs)
        for one in measured
        if one.cell.policy != reference
        for ours, theirs in zip(one.outcomes, base.get((one.cell.repeat, one.cell.concurrency), ()), strict=False)
        if ours is not None and theirs is not None
    ]
    return len(pairs), sum(ours == theirs for ours, theirs in pairs)
