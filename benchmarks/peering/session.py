"""Carries a workload out: every engine loaded, warmed up, then turn after turn. Keeps what there is when stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peering.engine import Engine
from benchmarks.peering.others import Others
from benchmarks.peering.ratios import Row, Turn, summarise
from benchmarks.peering.workload import Cell, Work, Workload

__all__ = ["Session"]

_LOOK_SECONDS = 1.0


@dataclass(slots=True)
class Session:
    """A workload's turns so far.

    Args:
        workload: what is measured.
        engines: ours first; all others are compared with it.
        prompts: token ids, the same for every engine.
        quiet: the share of the processors that others may take; a turn waits for that, at most `wait` seconds, and is
            repeated where they took more after all, `tries` times in all; the quietest counts.
        hear: is told what goes on, a line at a time; `keep`: that a repeat is complete.
    """

    workload: Workload
    engines: Sequence[Engine]
    prompts: Sequence[Sequence[int]]
    quiet: float = 1.0
    tries: int = 4
    wait: float = 60.0
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
            self.turns += await self._cell(cell, began)
        self.keep()

    async def _cell(self, cell: Cell, began: float) -> list[Turn]:
        engines = {engine.name: engine for engine in self.engines}
        work = self.workload.work(cell, self.prompts)
        names = self.workload.turns(cell, list(engines))
        return [await self._quietest(cell, engines[name], work, began) for name in names]

    async def _quietest(self, cell: Cell, engine: Engine, work: Work, began: float) -> Turn:
        found = [await self._turn(cell, engine, work, began)]
        while len(found) < self.tries and found[-1].others > self.quiet:
            found.append(await self._turn(cell, engine, work, began))
        return min(found, key=lambda turn: turn.others)

    async def _turn(self, cell: Cell, engine: Engine, work: Work, began: float) -> Turn:
        await self._wait_for_quiet()
        start, others = time.monotonic() - began, Others()
        answer = await engine.run(work)
        turn = Turn(cell, engine.name, start, answer, others.share())
        self.hear(_line(turn))
        return turn

    async def _wait_for_quiet(self) -> None:
        """Gives up after `wait` seconds: a machine that is never quiet is measured as it is, and the table says so."""
        until = time.monotonic() + self.wait
        while self.quiet < 1 and time.monotonic() < until:
            others = Others()
            await asyncio.sleep(_LOOK_SECONDS)
            if others.share() <= self.quiet:
                return

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
