"""Carries a workload out: every engine loaded, warmed up, then turn after turn. Keeps what there is when stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peering.engine import Engine
from benchmarks.peering.others import Others
from benchmarks.peering.ratios import Row, Turn, summarise
from benchmarks.peering.workload import Cell, Workload

__all__ = ["Session"]


@dataclass(slots=True)
class Session:
    """A workload's turns so far.

    Args:
        workload: what is measured.
        engines: ours first; all others are compared with it.
        prompts: token ids, the same for every engine.
        quiet: the share of the processors that others may take; a cell that had more is measured again, `tries` times
            in all, and the quietest counts.
        hear: is told what goes on, a line at a time; `keep`: that a repeat is complete.
    """

    workload: Workload
    engines: Sequence[Engine]
    prompts: Sequence[Sequence[int]]
    quiet: float = 1.0
    tries: int = 4
    hear: Callable[[str], None] = lambda _: None
    keep: Callable[[], None] = lambda: None
    turns: list[Turn] = field(default_factory=list)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    async def run(self) -> None:
        """All of it. Whatever an engine raises ends the session: a table with holes would compare unlike things."""
        async with AsyncExitStack() as stack:
            for engine in self.engines:  # one after another: loading together, they would time out on a small machine
                self.hear(f"loading {engine.name}")
                await stack.enter_async_context(engine)
                self.facts[engine.name] = engine.facts
            await self._warm_up()
            await self._measure()

    async def _warm_up(self) -> None:
        for work in self.workload.warm_up(self.prompts):
            for engine in self.engines:
                self.hear(f"warming up {engine.name}, {work.streams} streams, temperature {work.temperature:g}")
                await engine.run(work)

    async def _measure(self) -> None:
        began = time.monotonic()
        repeat = 0
        for cell in self.workload.cells():
            if cell.repeat != repeat:
                repeat = cell.repeat
                self.keep()
            self.turns += await self._quietest(cell, began)
        self.keep()

    async def _quietest(self, cell: Cell, began: float) -> list[Turn]:
        found = [await self._cell(cell, began)]
        while len(found) < self.tries and _noise(found[-1]) > self.quiet:
            found.append(await self._cell(cell, began))
        return min(found, key=_noise)

    async def _cell(self, cell: Cell, began: float) -> list[Turn]:
        engines = {engine.name: engine for engine in self.engines}
        work = self.workload.work(cell, self.prompts)
        turns = []
        for name in self.workload.turns(cell, list(engines)):
            start, others = time.monotonic() - began, Others()
            answer = await engines[name].run(work)
            turns.append(Turn(cell, name, start, answer, others.share()))
            self.hear(_line(turns[-1]))
        return turns

    def rows(self) -> list[Row]:
        """What there is."""
        return summarise(self.turns, self.engines[0].name)

    def report(self) -> dict[str, Any]:
        """Everything as JSON has it, without the tokens."""
        return {
            "settings": asdict(self.workload) | {"prompts": len(self.prompts), "ignore_eos": True},
            "engines": dict(self.facts),
            "rows": [_row(row) for row in self.rows()],
            "turns": [_turn(turn) for turn in self.turns],
        }


def _noise(turns: Sequence[Turn]) -> float:
    return max(turn.others for turn in turns)


def _line(turn: Turn) -> str:
    cell, speed = turn.cell, turn.answer.tokens_per_second
    what = f"repeat {cell.repeat + 1}, {cell.streams} streams, temperature {cell.temperature:g}, {turn.engine}"
    return f"{what}: {speed:.1f} tokens/s, others took {turn.others:.0%}"


def _row(row: Row) -> dict[str, Any]:
    ratio = row.ratio and {"median": row.ratio.median, "low": row.ratio.low, "high": row.ratio.high}
    return asdict(row) | {"tokens_per_second": row.tokens_per_second, "ratio": ratio}


def _turn(turn: Turn) -> dict[str, Any]:
    answer = turn.answer
    figures = {"tokens": sum(map(len, answer.tokens)), "seconds": answer.seconds, **answer.notes}
    return asdict(turn.cell) | {"engine": turn.engine, "began": turn.began, "others": turn.others} | figures
