"""Carries out a plan against a router: warms up, measures cell after cell, keeps what there is when it is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark.benchmarking.figures import figures_of
from dspark.benchmarking.load import Run, closed_loop
from dspark.benchmarking.plan import Cell, Job, Plan
from dspark.benchmarking.summary import Measured
from dspark.client import Client
from dspark.errors import Unavailable

__all__ = ["Listener", "Session"]

_WARM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Listener:
    """Who hears of a session: of each cell that begins, each request that is done, and each repeat that is complete."""

    cell: Callable[[Cell], None] = lambda _: None
    request: Callable[[], None] = lambda: None
    repeat: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Session:
    """A plan's measurements so far.

    Args:
        plan: what is measured.
        prompts: at least one; too few for the plan are used again, with other seeds.
        touch: have each cell's prompts computed just before it, so that where workers keep prefixes every policy finds
            them equally warm. Without it they must be served without a prefix cache, or the first policy to meet a
            prompt pays for all.
    """

    plan: Plan
    prompts: Sequence[str]
    touch: bool = False
    measured: list[Measured] = field(default_factory=list)
    complete: bool = False

    async def run(self, client: Client, listener: Listener | None = None) -> None:
        """Measures everything.

        Raises:
            DSparkError: a request failed during warm-up: what the router does not take is known before anything is
                measured. Later failures are counted.
            Unavailable: every request of a cell failed, as when the router has gone.
        """
        listener = listener or Listener()
        await self._warm_up(client)
        began = time.monotonic()
        for cell in self.plan.cells():
            jobs = self.plan.jobs(cell, self.prompts)
            if self.touch:
                await closed_loop(client, _shortened(jobs, 1), cell.concurrency)
            listener.cell(cell)
            start = time.monotonic() - began
            run = await closed_loop(client, jobs, cell.concurrency, progress=listener.request)
            self.measured.append(Measured(cell, start, figures_of(run), _outcomes(run)))
            _check_any(cell, run)
            if self._ends_repeat(cell):
                listener.repeat()
        self.complete = True

    async def _warm_up(self, client: Client) -> None:
        """Every policy once with as many users as ever, for a few tokens; what it measures is thrown away.

        Its seeds and its order of prompts come from behind the last cell of the plan.
        """
        concurrency = self.plan.concurrencies[-1]
        for policy in self.plan.policies:
            cell = Cell(self.plan.repeats, concurrency, policy, -1)
            jobs = _shortened(self.plan.whole_jobs(cell, self.prompts)[:concurrency], _WARM_TOKENS)
            run = await closed_loop(client, jobs, concurrency)
            for timing in run.timings:
                if timing.error is not None:
                    raise timing.error

    def _ends_repeat(self, cell: Cell) -> bool:
        return (cell.order + 1) % (len(self.plan.policies) * len(self.plan.concurrencies)) == 0


def _shortened(jobs: Sequence[Job], tokens: int) -> list[Job]:
    return [(prompt, params | {"max_tokens": min(tokens, params["max_tokens"] or tokens)}) for prompt, params in jobs]


def _outcomes(run: Run) -> tuple[int | None, ...]:
    return tuple(None if timing.error else timing.outcome for timing in run.timings)


def _check_any(cell: Cell, run: Run) -> None:
    errors = [timing.error for timing in run.timings if timing.error is not None]
    if len(errors) == len(run.timings):
        raise Unavailable(f"every request of {cell.policy} at {cell.concurrency} failed: {errors[0]}") from errors[0]
