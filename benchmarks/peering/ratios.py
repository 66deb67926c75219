"""Turns become medians, neighbours become ratios. Pure functions.

A *ratio* is our tokens a second over a peer's in the same cell: the machine was then as it was for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from benchmarks.peering.engine import Answer
from benchmarks.peering.workload import Cell
from dspark.benchmarking.summary import Ratio

__all__ = ["Row", "Turn", "common_start", "summarise"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine's turn in a cell.

    `began` is in seconds since the first did; `others` what share of the processors others took meanwhile.
    """

    cell: Cell
    engine: str
    began: float
    answer: Answer
    others: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """An engine at one setting over all repeats.

    Attributes:
        values: tokens a second, one a repeat; tokens_per_second: their median.
        ratio: ours over this engine's; None for ourselves, and where no cell has both.
        common_start: how many tokens its greedy answers share with ours from the start, on average; None where
            temperature leaves that to chance.
        notes: means of what the engine said of its turns.
        others: the greatest share of the processors that programs outside took during a turn.
    """

    temperature: float
    streams: int
    engine: str
    values: tuple[float, ...]
    ratio: Ratio | None
    common_start: float | None
    notes: Mapping[str, float]
    others: float

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return median(self.values)


def summarise(turns: Sequence[Turn], ours: str) -> list[Row]:
    """One row for each setting and engine, by temperature and streams, then in the order of `turns`; ours first."""
    settings = sorted({turn.cell.setting for turn in turns})
    engines = sorted(dict.fromkeys(turn.engine for turn in turns), key=lambda name: name != ours)
    rows = (_row(turns, setting, engine, ours) for setting in settings for engine in engines)
    return [row for row in rows if row is not None]


def _row(turns: Sequence[Turn], setting: tuple[float, int], engine: str, ours: str) -> Row | None:
    theirs, base = _by_cell(turns, setting, engine), _by_cell(turns, setting, ours)
    if not theirs:
        return None
    pairs = [(base[cell], answer) for cell, answer in theirs.items() if cell in base and engine != ours]
    ratios = tuple(our.tokens_per_second / their.tokens_per_second for our, their in pairs)
    shared = [common_start(our, their) for our, their in pairs] if setting[0] == 0 else []
    return Row(
        temperature=setting[0],
        streams=setting[1],
        engine=engine,
        values=tuple(answer.tokens_per_second for answer in theirs.values()),
        ratio=Ratio(ratios) if ratios else None,
        common_start=mean(shared) if shared else None,
        notes=_means(answer.notes for answer in theirs.values()),
        others=max(turn.others for turn in turns if (turn.cell.setting, turn.engine) == (setting, engine)),
    )


def _by_cell(turns: Iterable[Turn], setting: tuple[float, int], engine: str) -> dict[Cell, Answer]:
    return {turn.cell: turn.answer for turn in turns if (turn.cell.setting, turn.engine) == (setting, engine)}


def _means(notes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for one in notes:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: mean(values) for name, values in found.items()}


def common_start(ours: Answer, theirs: Answer) -> float:
    """How many tokens two engines' answers to the same prompts share from the start, on average."""
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    return mean(_shared(a, b) for a, b in pairs)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    differ = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
