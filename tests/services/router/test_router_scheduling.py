"""The scheduler in real routers over toy workers whose steps cost what their rows cost."""

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.toys import (
    BOS,
    Cluster,
    Result,
    ToyDraft,
    ToyVerifier,
    by_fives,
    cluster,
    expected,
    ids_of,
    letters,
    until,
)

from dspark.costs import CostProfile, Point
from dspark.errors import DSparkError
from dspark.messages import Attached, AttachSequence, StepItem, StepResult
from dspark.v1.verifier_pb2 import DescribeVerifierResponse
from services.router.holding import PATIENCE, QUIET, Holding
from services.router.scheduler import LOOKED, SPARED
from services.router.scheduling.looks import FIRST, SERIES
from services.router.scheduling.policies import Adaptive, CapAccept, Policy

PROMPT = [BOS, *ids_of("hello")]
FIXED, ROW = 0.008, 0.0004  # seconds of a step, and of each of its rows beyond the free ones
FREE_ROWS = 12


def seconds(rows: int) -> float:
    """Flat while rows are few, as where weights have to be read anyway; then every row is paid for."""
    return FIXED + ROW * max(0, rows - FREE_ROWS)


def rows_of(items: Iterable[StepItem]) -> int:
    return sum(item.rows for item in items)


class PricedVerifier(ToyVerifier):
    """Takes `seconds` of its rows, and has published that."""

    def __init__(self, worker_id: str = "verify-0") -> None:
        super().__init__(worker_id)
        points = tuple(Point(rows, 64, seconds(rows)) for rows in (1, 4, 12, 16, 32, 64, 128, 256, 512))
        self.costs = CostProfile("verify", "toy-verify-costs", points, 0.0)
        self.step_cost = seconds

    async def _step(self, items: tuple[StepItem, ...]) -> StepResult | DSparkError:
        self.row_seconds = self.step_cost(rows := rows_of(items)) / rows
        return await super()._step(items)


class HoldingVerifier(PricedVerifier):
    """Writes down of every step, by sequence, whether its features may wait and whether it has drafts."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, tuple[bool, bool]]] = []

    async def answer(self, request: Any, mine: set[str]) -> Any:
        if request.WhichOneof("call") == "step":
            items = request.step.items
            self.told.append({item.sequence_id: (item.hold_features, bool(item.draft_tokens)) for item in items})
        return await super().answer(request, mine)


class BlindVerifier(ToyVerifier):
    """Has published nothing, and counts who asks."""

    described = 0

    async def Describe(self, request: Any, context: Any) -> DescribeVerifierResponse:
        self.described += 1
        return await super().Describe(request, context)


class CountingDraft(ToyDraft):
    """Counts who is attached."""

    attachments = 0

    def _attach(self, message: AttachSequence, mine: set[str]) -> Attached:
        self.attachments += 1
        return super()._attach(message, mine)


def drafter(second: Callable[[int], bool] | None = None) -> ToyDraft:
    """Right two times in three, and says so."""
    toy = ToyDraft(second=second)
    toy.costs = CostProfile("draft", "toy-draft-costs", tuple(Point(n, 64, 0.0005) for n in (1, 64)), 0.0)
    return toy


async def crowd(toys: Cluster, users: int, tokens: int, **fields: object) -> list[Result]:
    return list(
        await asyncio.gather(
            *(toys.generate("hello", sampling={"seed": s}, max_tokens=tokens, **fields) for s in range(users))  # type: ignore[arg-type]
        )
    )


def length(results: list[Result]) -> float:
    """Draft tokens verified a sequence and round."""
    counts = [result.finished.speculation for result in results]
    return float(sum(c.verified for c in counts) / sum(c.rounds for c in counts))


def assert_right(results: list[Result], tokens: int) -> None:
    for seed, result in enumerate(results):
        assert result.ids == expected(letters, PROMPT, seed, tokens)


async def test_verify_lengths_fall_as_the_verifier_fills_and_no_token_changes() -> None:
    lengths = []
    async with cluster(PricedVerifier(), drafter(), options=by_fives(policy=Adaptive())) as toys:
        for users in (1, 6, 40):
            results = await crowd(toys, users, 60)
            assert_right(results, 60)
            lengths.append(length(results))
    assert lengths[0] > 3  # rows are free there
    assert lengths[0] > lengths[1] > lengths[2]
    assert lengths[2] < 1.5


async def test_alternatives_are_verified_where_rows_are_free_and_change_no_token() -> None:
    rounds, counts = [], []
    for second in (None, lambda position: position % 2 == 0):
        verifier = PricedVerifier()
        async with cluster(verifier, drafter(second), options=by_fives(policy=Adaptive())) as toys:
            (result,) = await crowd(toys, 1, 200)
            assert_right([result], 200)
            counts.append(result.finished.speculation)
            crowded = await crowd(toys, 40, 30)
            assert_right(crowded, 30)
            rejection = await toys.generate("hello", sampling={"mode": "SAMPLING_MODE_REJECTION"}, max_tokens=40)
            assert rejection.ids == expected(letters, PROMPT, 5, 40)
        rounds.append(counts[-1].rounds)
    assert (counts[0].alternatives, counts[0].turned) == (0, 0)
    assert 0 < counts[1].turned < counts[1].alternatives < counts[1].verified
    assert counts[1].accepted + counts[1].rounds >= 199
    assert rounds[1] < 0.95 * rounds[0]
    busy = [result.finished.speculation for result in crowded]
    alone = counts[1].alternatives / counts[1].rounds
    assert sum(c.alternatives for c in busy) / sum(c.rounds for c in busy) < 0.5 * alone
    assert rejection.finished.speculation.alternatives == 0


async def test_adaptive_takes_less_of_the_verifier_than_whole_blocks_where_rows_are_paid_for() -> None:
    taken = {}
    verifier = PricedVerifier()
    async with cluster(verifier, drafter(), options=by_fives(policy=Adaptive())) as toys:
        for policy in ("fixed:7", "adaptive"):
            verifier.steps.clear()
            assert_right(await crowd(toys, 8, 60, policy=policy), 60)
            taken[policy] = sum(seconds(rows_of(step)) for step in verifier.steps)
    assert taken["adaptive"] < 0.97 * taken["fixed:7"]  # .8 to .9; on a busy machine all rows seem dear, and are alike


async def test_adaptive_asks_for_hardly_more_of_a_block_than_it_verifies() -> None:
    wanted = {}
    steep = {rows: FIXED + FIXED * max(0, rows - 3) for rows in range(1, 17)}  # a third row is free, a fourth is not
    for policy in ("cap-accept", "adaptive"):
        verifier, draft = PricedVerifier(), drafter()
        verifier.step_cost = lambda rows: steep[min(rows, 16)]
        verifier.costs = CostProfile("verify", "steep", tuple(Point(rows, 64, steep[rows]) for rows in steep), 0.0)
        async with cluster(verifier, draft, options=by_fives(policy=Adaptive(), explore=0)) as toys:
            assert_right([await toys.generate("hello", sampling={"seed": 0}, max_tokens=100, policy=policy)], 100)
        wanted[policy] = list(draft.wanted)
    assert min(wanted["cap-accept"][:8]) >= 4  # as much as pays at all
    assert min(wanted["adaptive"][:8]) >= 4
    assert max(wanted["adaptive"][9:13]) <= 3  # what eight rounds came to, one round later


@pytest.mark.parametrize("policy", [Adaptive(), CapAccept()])
async def test_requests_of_one_batch_follow_their_own_policies(policy: Policy) -> None:
    own = ("", "none", "fixed:2", "threshold:0.9", "threshold:0.1", "adaptive", "cap-accept", "fixed:0")
    async with cluster(PricedVerifier(), drafter(), options=by_fives(policy=policy)) as toys:
        results = await asyncio.gather(
            *(toys.generate("hello", sampling={"seed": s}, max_tokens=60, policy=name) for s, name in enumerate(own))
        )
    assert_right(results, 60)
    by_name = {name: length([result]) for name, result in zip(own, results, strict=True)}
    assert by_name["none"] == by_name["fixed:0"] == 0
    assert 1.5 < by_name["fixed:2"] <= 2
    assert by_name["threshold:0.9"] == 0  # the toy is never so sure
    assert by_name["threshold:0.1"] > 5
    assert by_name["adaptive"] > 0


async def test_cap_accept_verifies_whole_blocks_and_keeps_what_adaptive_would() -> None:
    shares = {}
    for policy in (Adaptive(), CapAccept()):
        verifier = PricedVerifier()
        async with cluster(verifier, drafter(), options=by_fives(policy=policy)) as toys:
            results = await crowd(toys, 8, 60)
        assert_right(results, 60)
        counts = [result.finished.speculation for result in results]
        shares[type(policy)] = sum(c.verified for c in counts) / sum(c.drafted for c in counts)
    assert shares[Adaptive] < 0.9
    assert shares[CapAccept] == 1
    cut = [item for step in verifier.steps for item in step if item.keep is not None]
    assert cut
    assert all(item.keep < len(item.draft_tokens) for item in cut if item.keep is not None)


async def test_a_verifier_that_slows_down_is_noticed_within_a_few_steps(tmp_path: Path) -> None:
    """Where every row suddenly costs, lengths shrink; when that is over they are back."""
    verifier, trace = PricedVerifier(), tmp_path / "trace.jsonl"
    async with cluster(verifier, drafter(), options=by_fives(policy=Adaptive(), trace=trace)) as toys:
        await crowd(toys, 6, 120)
        verifier.step_cost = lambda rows: 3 * seconds(rows)
        await crowd(toys, 6, 120)
    rounds = [json.loads(line) for line in trace.read_text().splitlines()]
    last = [r["expected_step_seconds"] / r["step_seconds"] for r in rounds[-20:] if r["running"] == 6]
    assert sorted(last)[len(last) // 2] == pytest.approx(1, abs=0.15)
    assert {"load_age", "tokens", "expected_tokens", "draft_seconds"} <= rounds[0].keys()


async def test_a_profile_that_condemns_drafting_is_put_right_by_steps() -> None:
    """Measured beside other work, drafting seemed to take fifty times what it does."""
    wrong = drafter()
    wrong.costs = CostProfile("draft", "toy-wrong-costs", tuple(Point(n, 64, 0.05) for n in (1, 64)), 0.0)
    wrong.delay = 0.001
    async with cluster(PricedVerifier(), wrong, options=by_fives(policy=Adaptive())) as toys:
        await crowd(toys, 1, 60)
        later = await crowd(toys, 1, 60)
    assert_right(later, 60)
    assert length(later) > 3


async def test_drafting_that_does_not_seem_to_pay_is_looked_at_for_a_few_streams(tmp_path: Path) -> None:
    dear = drafter()
    dear.costs = CostProfile("draft", "toy-dear-costs", tuple(Point(n, 64, 0.05) for n in (1, 64)), 0.0)
    dear.delay = 0.02
    trace = tmp_path / "rounds.jsonl"
    options = by_fives(policy=Adaptive(), explore=0.0, trace=trace)
    async with cluster(PricedVerifier(), dear, options=options) as toys:
        await crowd(toys, 12, 480)
    rounds = [json.loads(line) for line in trace.read_text().splitlines()]
    later = [one["drafted"] for one in rounds[2 * FIRST :] if one["running"] == 12]
    assert max(one["drafted"] for one in rounds[:FIRST]) == LOOKED
    assert set(later) == {0, LOOKED}
    assert later.count(LOOKED) <= 2 * SERIES


class LinearVerifier(PricedVerifier):
    """Every row costs as much as any other, so that no draft is worth its row."""

    def __init__(self) -> None:
        super().__init__()
        points = tuple(Point(rows, 64, self.linear(rows)) for rows in (1, 4, 16, 64, 256))
        self.costs = CostProfile("verify", "toy-linear-costs", points, 0.0)
        self.step_cost = self.linear

    @staticmethod
    def linear(rows: int) -> float:
        return 0.0005 + 0.0008 * rows


async def test_a_prompt_in_the_step_makes_no_drafts_worth_while_that_are_not_without_it(tmp_path: Path) -> None:
    """The step is long then, and longer by little with drafts; but they would still take time from all."""
    trace = tmp_path / "rounds.jsonl"
    options = by_fives(policy=Adaptive(), explore=0.0, trace=trace)
    async with cluster(LinearVerifier(), drafter(), options=options) as toys:
        others = asyncio.create_task(crowd(toys, 6, 120))
        await asyncio.sleep(0.5)
        await toys.generate("hello " * 60, max_tokens=4)
        await others
    rounds = [json.loads(line) for line in trace.read_text().splitlines()]
    beside = [one for one in rounds if one["prompt_rows"] > one["running"] >= 6]
    assert beside
    assert not any(one["drafted"] for one in beside)


async def test_nobody_is_drafted_for_at_the_cost_of_many_who_wait_for_their_prompts(tmp_path: Path) -> None:
    """A draft that pays for a stream alone keeps twelve others waiting that would bring more in the time."""
    dear = drafter()
    dear.costs = CostProfile("draft", "toy-dear-costs", tuple(Point(n, 64, 0.004) for n in (1, 64)), 0.0)
    dear.delay = 0.004
    trace = tmp_path / "rounds.jsonl"
    options = by_fives(policy=Adaptive(), explore=0.0, trace=trace)
    async with cluster(PricedVerifier(), dear, options=options) as toys:
        alone = asyncio.create_task(toys.generate("hello", max_tokens=250))
        await asyncio.sleep(0.5)
        await asyncio.gather(*(toys.generate("hello " * 150, max_tokens=1) for _ in range(12)))
        await alone
    rounds = [json.loads(line) for line in trace.read_text().splitlines()]
    before = next(i for i, one in enumerate(rounds[1:], 1) if one["prompt_rows"])
    beside = [one["drafted"] for one in rounds[before:] if one["prompt_rows"] and one["running"] == 1]
    assert sum(one["drafted"] for one in rounds[FIRST:before]) > 0.5 * (before - FIRST)
    assert len(beside) > 2 * SPARED
    assert not any(beside[SPARED + 1 : -len(beside) // 3])


async def test_features_wait_while_nobody_is_drafted_for_and_are_there_when_somebody_is() -> None:
    dear, verifier = drafter(), HoldingVerifier()
    dear.costs = CostProfile("draft", "toy-held-costs", tuple(Point(n, 64, 0.05) for n in (1, 64)), 0.0)
    dear.delay = 0.02
    async with cluster(verifier, dear, options=by_fives(policy=Adaptive())) as toys:
        assert_right(await crowd(toys, 6, 480), 480)
    steps = list(enumerate(verifier.told))
    looked = [(step, name) for step, told in steps[2 * FIRST :] for name, (_, drafts) in told.items() if drafts]
    assert looked
    assert not any(verifier.told[step - 1][name][0] for step, name in looked)  # the step before brought the features
    held = [sum(holds for holds, _ in told.values()) for told in verifier.told]
    assert sum(count == 6 for count in held) > len(held) / 2
    assert not any(held[:QUIET])
    drafted = [(step, name) for step, told in steps for name, (_, drafts) in told.items() if drafts]
    after = [told[name] for step, name in drafted for told in verifier.told[step : step + QUIET] if name in told]
    assert drafted
    assert not any(holds for holds, _ in after)  # features of who was drafted for are sent for some rounds more
    assert any(0 < held[step] < 6 for step, _ in looked)  # a look at some leaves the others' where they are


async def test_who_comes_while_nobody_is_drafted_for_gets_a_drafter_when_somebody_is() -> None:
    dear = CountingDraft()
    dear.costs = CostProfile("draft", "toy-unattached-costs", tuple(Point(n, 64, 0.05) for n in (1, 64)), 0.0)
    dear.delay = 0.05
    options = by_fives(policy=Adaptive(), explore=0.0)
    async with cluster(PricedVerifier(), dear, options=options) as toys:
        assert_right(await crowd(toys, 6, 160), 160)
        before = dear.attachments
        assert before == 6
        assert_right(results := await crowd(toys, 6, 20), 20)
        assert dear.attachments < before + 6  # nothing is known of fewer streams, as while these come
        assert length(results) < 0.5
        before = dear.attachments
        assert_right(results := await crowd(toys, 6, 400), 400)
        looked = sum(result.finished.speculation.verified > 0 for result in results)
        assert 0 < looked <= dear.attachments - before
        asked = await toys.generate("hello", sampling={"seed": 0}, max_tokens=60, policy="fixed:3")
        assert_right([asked], 60)
        assert length([asked]) > 1  # whoever wants drafts whatever they cost is attached at once


def test_beginning_to_draft_takes_patience_with_a_load_that_falls_for_a_moment() -> None:
    holding = Holding()
    round_: Any = SimpleNamespace(running=[SimpleNamespace(quiet=q, chosen=0) for q in (0, QUIET)])
    both, none = np.ones(2, np.bool_), np.zeros(2, np.bool_)
    for chosen in (*[both] * (PATIENCE - 1), none, *[both] * (PATIENCE - 1)):
        assert holding.lasting(round_, chosen).tolist() == [bool(chosen[0]), False]
    assert holding.lasting(round_, both).tolist() == [True, True]


async def test_routers_of_one_verifier_see_each_others_rows() -> None:
    async with cluster(PricedVerifier(), drafter(), routers=2, options=by_fives(policy=Adaptive())) as toys:
        both = await asyncio.gather(
            *(
                toys.generate("hello", router=s % 2, sampling={"seed": s}, max_tokens=60, request_id=f"r{s}")
                for s in range(8)
            )
        )
    assert_right(both, 60)


async def test_without_costs_adaptive_workers_are_refused_and_others_serve() -> None:
    blind, priced = BlindVerifier("blind"), PricedVerifier("priced")
    async with cluster(priced, drafter(), options=by_fives(policy=Adaptive())) as toys:
        await toys.add(blind)
        await until(lambda: blind.described > 0)
        assert_right(await crowd(toys, 4, 20), 20)
        assert list(toys.engine.verifiers.links) == ["priced"]
    assert not blind.steps


async def test_a_worker_without_costs_ends_no_router_that_has_others() -> None:
    """Neither where it is heard of first, nor where the others are away for a moment."""
    blind, priced = BlindVerifier("a-blind"), PricedVerifier("b-priced")
    blind.listed = priced.listed = False
    async with cluster(drafter(), options=by_fives(policy=Adaptive())) as toys:
        ending = asyncio.create_task(toys.engine.until_blind())
        await toys.add(blind)
        await toys.add(priced)
        blind.listed = priced.listed = True
        await until(lambda: toys.engine.verifiers.links)
        assert_right(await crowd(toys, 4, 20), 20)
        seen = blind.described
        await priced.kill()
        await until(lambda: not toys.engine.verifiers.links and blind.described > seen)
        await asyncio.sleep(0.1)
        assert not ending.done()
        ending.cancel()


async def test_where_no_worker_ever_had_costs_the_router_says_so() -> None:
    async with cluster(drafter(), options=by_fives(policy=Adaptive())) as toys:
        await toys.add(BlindVerifier("blind"))
        async with asyncio.timeout(10):
            assert "no cost profile" in str(await toys.engine.until_blind())


async def test_static_policies_beside_a_router_that_stepped_back_keep_it_serving() -> None:
    """Their losing rounds say nothing about the scheduler's level, which has none below plain decoding."""
    useless, verifier = drafter(), PricedVerifier()
    useless.spoil = lambda _: True
    async with cluster(verifier, useless, options=by_fives(policy=Adaptive())) as toys:
        results = await asyncio.gather(
            *(
                toys.generate("hello", sampling={"seed": s}, max_tokens=150, policy="fixed:7" if s % 2 else "")
                for s in range(6)
            )
        )
    assert_right(results, 150)
    assert verifier.sessions == 0
    assert len({key for step in verifier.steps for key in (item.key for item in step)}) == 6  # none was opened anew


async def test_a_store_that_is_gone_changes_nothing_but_the_age_of_what_is_known() -> None:
    async with cluster(PricedVerifier(), drafter(), options=by_fives(policy=Adaptive())) as toys:
        await crowd(toys, 2, 30)
        toys.board.emptied = True
        results = await crowd(toys, 2, 60)
        assert_right(results, 60)
        assert length(results) > 3


async def test_speculation_comes_back_where_the_drafter_stays_with_streams() -> None:
    verifier, draft = PricedVerifier(), drafter()
    draft.stays = True
    verifier.on_commit = draft.committed
    async with cluster(verifier, draft, options=by_fives(policy=Adaptive())) as toys:
        await toys.generate("hello", max_tokens=60)
        scheduler = next(iter(toys.engine._schedulers.values()))
        payoff = scheduler.weighing._of("coupled").payoffs._at(1)
        payoff._go(2)  # as after a bad stretch
        assert payoff.limit == 0
        assert_right([await toys.generate("hello", max_tokens=600, sampling={"seed": 0})], 600)
        assert payoff.limit > 0
