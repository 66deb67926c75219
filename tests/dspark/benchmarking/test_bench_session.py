"""Plans, closed loops and sessions, against a router that only says what it is told to."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.scripted_router import ScriptedRouter, running

from dspark.benchmarking.load import closed_loop
from dspark.benchmarking.plan import Cell, Plan, parse_concurrencies, parse_policies
from dspark.benchmarking.session import Listener, Session
from dspark.client import Client
from dspark.errors import ConfigError, InvalidRequest, Unavailable
from dspark.v1 import generation_pb2 as pb

PLAN = Plan(("none", "fixed:1", "default"), (1, 2), repeats=3, requests=3)


class Picky(ScriptedRouter):
    """Refuses one policy; may be told to fail from some request on; counts who is there at once."""

    def __init__(self, *, refuses: str = "", fails_after: int | None = None) -> None:
        super().__init__()
        self._refuses = refuses
        self._fails_after = fails_after
        self._present = 0
        self.most_present = 0

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if self._refuses and request.policy == self._refuses:
            raise InvalidRequest(f"policy {request.policy!r} is not served")
        if self._fails_after is not None and len(self.requests) >= self._fails_after:
            raise Unavailable("no worker is there")
        self._present += 1
        self.most_present = max(self.most_present, self._present)
        try:
            await asyncio.sleep(0.02)
            async for response in super().Generate(request, context):
                yield response
        finally:
            self._present -= 1


# ---------------------------------------------------------------- what is asked for


def test_policies_are_read() -> None:
    text = "none, fixed:1,fixed:01 ,adaptive,cap-accept,threshold:0.5,threshold:.25,threshold:1,default,none"
    expected = ["none", "fixed:1", "adaptive", "cap-accept", "threshold:0.5", "threshold:.25", "threshold:1", "default"]
    assert list(parse_policies(text)) == expected


@pytest.mark.parametrize("text", ["", " , ", "fast", "fixed", "fixed:", "fixed:-1", "fixed:x", "threshold:2", "None"])
def test_unknown_policies_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"fixed:N.*adaptive"):
        parse_policies(text)


def test_concurrencies_are_read() -> None:
    assert parse_concurrencies("8, 1,8,2") == (1, 2, 8)
    for text in ("", "0", "1,0", "-1", "two", "1.5", "4097", "²"):
        with pytest.raises(ConfigError, match="concurrency"):
            parse_concurrencies(text)


# ---------------------------------------------------------------- the plan


def test_policies_take_turns_and_the_first_changes() -> None:
    cells = list(PLAN.cells())
    assert [cell.order for cell in cells] == list(range(18))
    blocks = [cells[i : i + 3] for i in range(0, 18, 3)]
    assert [(b[0].repeat, b[0].concurrency) for b in blocks] == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert [b[0].policy for b in blocks] == ["none", "none", "fixed:1", "fixed:1", "default", "default"]
    assert all({cell.policy for cell in block} == set(PLAN.policies) for block in blocks)


def test_policies_get_the_same_prompts_and_seeds_and_no_cell_else_does() -> None:
    prompts = [f"p{n}" for n in range(50)]
    seen: dict[tuple[int, int], list[tuple[str, int | None]]] = {}
    for cell in PLAN.cells():
        jobs = PLAN.jobs(cell, prompts)
        assert len(jobs) == PLAN.size(cell.concurrency) == (3 if cell.concurrency == 1 else 6)
        what = [(prompt, params["seed"]) for prompt, params in jobs]
        assert seen.setdefault((cell.repeat, cell.concurrency), what) == what
        wanted = None if cell.policy == "default" else cell.policy
        assert {params.get("policy") for _, params in jobs} == {wanted}
    used = [one for jobs in seen.values() for one in jobs]
    assert len(used) == len(set(used)) == 3 * (3 + 6)
    assert [prompt for prompt, _ in used] == prompts[:27]
    few = [PLAN.jobs(cell, prompts[:2]) for cell in PLAN.cells() if cell.policy == "none"]
    assert len({params["seed"] for jobs in few for _, params in jobs}) == 27


def test_users_come_to_their_second_requests_one_after_the_other() -> None:
    """Whatever the policy: a cell's first answers are cut to shares of a whole one, the other answers are not."""
    plan = Plan(("none", "fixed:1"), (1, 4), requests=3, max_tokens=50)
    for policy in plan.policies:
        lengths = {
            users: [params["max_tokens"] for _, params in plan.jobs(Cell(1, users, policy, 0), ["p"])]
            for users in plan.concurrencies
        }
        assert lengths == {1: [50] * 3, 4: [13, 25, 38, 50] + [50] * 8}


# ---------------------------------------------------------------- the loop


async def test_a_closed_loop_keeps_its_users_busy_and_notes_every_arrival() -> None:
    router = Picky()
    jobs = PLAN.jobs(Cell(0, 2, "fixed:1", 0), ["a", "b"]) * 2
    async with running(router) as server, Client(f"127.0.0.1:{server.port}") as client:
        run = await closed_loop(client, jobs, 3)
    assert router.most_present == 3
    assert [timing.index for timing in run.timings] == list(range(12))
    assert all([count for _, count in timing.arrivals] == [1, 2] for timing in run.timings)
    assert all(timing.submitted < timing.arrivals[0][0] <= timing.arrivals[1][0] for timing in run.timings)
    assert len({timing.outcome for timing in run.timings}) == 1
    assert 0 < run.ran_out <= run.seconds
    assert {request.policy for request in router.requests} == {"fixed:1"}


async def test_failures_are_noted_and_end_nothing() -> None:
    async with running(ScriptedRouter()) as server, Client(f"127.0.0.1:{server.port}") as client:
        run = await closed_loop(client, [("full", {}), ("broken", {}), ("fine", {})], 1)
    full, broken, fine = run.timings
    assert "queue is full" in str(full.error)
    assert broken.tokens == 3  # the router ended the stream early: its tokens came, its counts did not
    assert fine.error is None


# ---------------------------------------------------------------- the session


async def test_a_session_measures_every_cell_after_warming_up() -> None:
    router, heard = Picky(), []
    listener = Listener(lambda cell: heard.append(cell.order), lambda: heard.append(-1), lambda: heard.append(-2))
    session = Session(PLAN, ["a", "b", "c"])
    async with running(router) as server, Client(f"127.0.0.1:{server.port}") as client:
        await session.run(client, listener)
    assert session.complete
    assert [one.cell for one in session.measured] == list(PLAN.cells())
    assert [number for number in heard if number >= 0] == list(range(18))
    assert heard.count(-2) == 3
    assert heard.count(-1) == 3 * 3 * (3 + 6) == len(router.requests) - 6
    assert [one.began for one in session.measured] == sorted(one.began for one in session.measured)
    assert {request.max_tokens for request in router.requests[:6]} == {16}
    assert all(one.figures.tokens_per_second for one in session.measured)


async def test_touching_computes_each_cells_prompts_beforehand() -> None:
    router = Picky()
    plan = Plan(("none",), (1,), repeats=1, requests=3)
    async with running(router) as server, Client(f"127.0.0.1:{server.port}") as client:
        await Session(plan, ["a", "b", "c"], touch=True).run(client)
    found = [(request.text, request.max_tokens) for request in router.requests[1:]]
    assert found == [(text, tokens) for tokens in (1, 128) for text in "abc"]


async def test_what_the_router_does_not_take_ends_the_session_before_it_measures() -> None:
    session = Session(PLAN, ["a"])
    async with running(Picky(refuses="fixed:1")) as server, Client(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InvalidRequest, match="'fixed:1' is not served"):
            await session.run(client)
    assert not session.measured


async def test_a_router_that_has_gone_ends_the_session_and_leaves_what_there_is() -> None:
    session = Session(PLAN, ["a"])
    async with running(Picky(fails_after=6 + 3 + 1)) as server, Client(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(Unavailable, match=r"every request of default at 1 failed: .*no worker is there"):
            await session.run(client)
    assert [one.figures.errors for one in session.measured] == [0, 2, 3]
    assert not session.complete
