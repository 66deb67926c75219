"""DSpark Serving as the others meet it: a router, a draft and a verify worker over gRPC, token ids in and out.

Timed at the client, as a user sees it who asks for whole answers, as the others' interfaces give them. The cluster is
not stopped between its turns, which would make its workers miss heartbeats: idle it takes 2 % of a core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from benchmarks.peering.engine import Answer, checked
from benchmarks.peering.workload import Work
from dspark.benchmarking.load import Run, Task, closed_loop
from dspark.benchmarking.plan import DEFAULT
from dspark.benchmarking.report import served
from dspark.cluster import Cluster
from dspark.errors import Unavailable
from dspark.events import Speculation
from dspark.messages import Mode
from dspark.params import GenerateParams

__all__ = ["Ours"]


@dataclass(eq=False)
class Ours:
    """A cluster for `async with`. `policy` is the router's own where it is "default", `weights` the worker's."""

    model: str
    drafter: str
    policy: str = DEFAULT
    mode: Mode = Mode.COUPLED
    router_args: Sequence[str] = ()
    weights: str | None = None
    name: str = "dspark"
    _facts: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is served and how."""
        return self._facts

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            cluster = Cluster(
                self.model,
                self.drafter,
                together=None,
                policy=None if self.policy == DEFAULT else self.policy,
                router_args=self.router_args,
                verify_args=("--no-prefix-cache", *(("--weights", self.weights) if self.weights else ())),
            )
            await stack.enter_async_context(cluster)
            self._client = await stack.enter_async_context(cluster.client())
            info = await self._client.describe()
            workers = {"draft": int(cluster.drafter is not None), "verify": 1}
            self._facts = {
                "engine": f"dspark {info.version}",
                "settings": {"mode": self.mode.value} | served(info, workers, prefix_cache=False),
            }
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def run(self, work: Work) -> Answer:
        """One turn."""
        jobs: list[Task] = [(prompt, self._params(work, index)) for index, prompt in enumerate(work.prompts)]
        run = await closed_loop(self._client, jobs, work.streams)
        if error := next((timing.error for timing in run.timings if timing.error is not None), None):
            raise Unavailable(f"{self.name}: {error}") from error
        tokens = tuple(timing.token_ids for timing in run.timings)
        return checked(self.name, work, Answer(tokens, run.seconds, _notes(run)))

    def _params(self, work: Work, index: int) -> GenerateParams:
        params: GenerateParams = {
            "max_tokens": work.max_tokens,
            "temperature": work.temperature,
            "seed": work.seed + index,
            "mode": self.mode,
            "ignore_eos": True,
            "whole": True,  # as the others' interfaces give it
        }
        return params if self.policy == DEFAULT else params | {"policy": self.policy}


def _notes(run: Run) -> dict[str, float]:
    counts = Speculation.total(timing.speculation for timing in run.timings)
    return {"tau": counts.tau, "verify_length": counts.verify_length} if counts.rounds else {}
