"""Workers that die, hang, drain, refuse or err while streams run: no stream is lost, and no token changes."""

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest
from support.toys import (
    BOS,
    DRAFTER,
    MODEL,
    VOCAB,
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

from dspark.errors import DSparkError, InvalidRequest, OutOfPages, StaleMessage, Unavailable, UnknownSequence
from services.router.options import Patience

PROMPT = [BOS, *ids_of("hello")]
FAST = Patience(features=0.05, round=0.1, worker=0.3)


async def streams(toys: Cluster, count: int, tokens: int) -> list[Result]:
    return await asyncio.gather(
        *(toys.generate("hello", max_tokens=tokens, sampling={"seed": seed}) for seed in range(count))
    )


def assert_right(results: list[Result], tokens: int) -> None:
    for seed, result in enumerate(results):
        assert result.ids == expected(letters, PROMPT, seed, tokens)
        assert result.finished.usage.completion_tokens == tokens


def slow(worker: ToyVerifier) -> ToyVerifier:
    worker.delay = 0.002
    return worker


# ---------------------------------------------------------------- verify workers


async def test_a_dead_verify_worker_costs_no_token() -> None:
    first, second, drafter = slow(ToyVerifier("v0")), slow(ToyVerifier("v1")), ToyDraft()
    async with cluster(first, second, drafter) as toys:
        running = asyncio.create_task(streams(toys, 8, 60))
        await until(lambda: len(first.steps) > 5 and len(second.steps) > 5)
        assert first.open
        assert second.open
        await first.kill()
        assert_right(await running, 60)
        moved = [message for message in second.opened if message.key.epoch > 1]
        assert moved
        assert all(len(message.token_ids) > len(PROMPT) for message in moved)
        await until(lambda: not second.open and not drafter.attached)


async def test_streams_wait_for_a_worker_when_the_only_one_dies() -> None:
    first = slow(ToyVerifier("v0"))
    async with cluster(first, ToyDraft()) as toys:
        running = asyncio.create_task(streams(toys, 4, 40))
        await until(lambda: len(first.steps) > 5)
        await first.kill()
        await asyncio.sleep(0.3)
        assert not running.done()
        await toys.add(ToyVerifier("v1"))
        assert_right(await running, 40)


async def test_without_any_worker_requests_end_unavailable_after_the_limit() -> None:
    first = slow(ToyVerifier("v0"))
    async with cluster(first, options=by_fives(worker_wait=0.3)) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=2000))
        await until(lambda: len(first.steps) > 5)
        await first.kill()
        with pytest.raises(grpc.aio.AioRpcError, match="no verify worker") as caught:
            await running
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_sequence_never_moves_to_other_numerics() -> None:
    first = slow(ToyVerifier("v0"))
    other = ToyVerifier("v1", model=dataclasses.replace(MODEL, numerics_fingerprint="float32"), rule=lambda *_: 300)
    async with cluster(first) as toys:
        running = asyncio.create_task(streams(toys, 3, 40))
        await until(lambda: len(first.steps) > 5)
        await toys.add(other)
        await first.kill()
        await until(lambda: "v1" in toys.engine.verifiers.links)
        await asyncio.sleep(0.2)
        assert not other.opened
        await toys.add(ToyVerifier("v2"))
        assert_right(await running, 40)
        assert not other.opened


async def test_a_hanging_verify_worker_is_given_up() -> None:
    first, second = slow(ToyVerifier("v0")), slow(ToyVerifier("v1"))
    async with cluster(first, second, ToyDraft(), options=by_fives(step_seconds=0.3)) as toys:
        running = asyncio.create_task(streams(toys, 4, 60))
        await until(lambda: len(first.steps) > 5 and first.open)
        first.hang = True
        assert_right(await running, 60)
        first.hang = False
        await until(lambda: first.sessions == 0 or not first.open)


async def test_a_draining_verify_worker_hands_its_streams_over() -> None:
    first, second = slow(ToyVerifier("v0")), slow(ToyVerifier("v1"))
    async with cluster(first, ToyDraft()) as toys:
        running = asyncio.create_task(streams(toys, 6, 250))
        await until(lambda: len(first.steps) > 5)
        first.draining = True
        await asyncio.sleep(0.1)
        assert first.open  # nowhere to go: it serves on
        await toys.add(second)
        await until(lambda: not first.open and second.open)
        assert not running.done()
        assert_right(await running, 250)


async def test_a_new_verify_worker_takes_new_requests() -> None:
    first, second = slow(ToyVerifier("v0")), ToyVerifier("v1")
    async with cluster(first, ToyDraft()) as toys:
        running = asyncio.create_task(streams(toys, 4, 3000))
        await until(lambda: len(first.open) == 4)
        await toys.add(second)
        await until(lambda: "v1" in toys.engine.verifiers.links)
        await streams(toys, 2, 5)
        assert len(second.opened) == 2
        assert not running.done()
        running.cancel()


@pytest.mark.parametrize("error", [UnknownSequence("gone"), StaleMessage("old"), OutOfPages("none")])
async def test_a_refused_item_is_opened_again(error: DSparkError) -> None:
    verifier = ToyVerifier()
    faults = iter([None, None, None, error, None, None, error])
    verifier.item_fault = lambda _item: next(faults, None)
    async with cluster(verifier, ToyDraft()) as toys:
        result = await toys.generate("hello", max_tokens=30, sampling={"seed": 0})
    assert_right([result], 30)
    assert verifier.opened[-1].key.epoch == 3


async def test_a_sequence_that_fails_for_ever_ends_with_an_error_and_leaves_the_rest_alone() -> None:
    verifier = ToyVerifier()
    verifier.item_fault = lambda item: InvalidRequest("bad") if item.committed_len == 20 else None
    async with cluster(verifier, ToyDraft(spoil=lambda _: True)) as toys:
        with pytest.raises(grpc.aio.AioRpcError, match="without a new token") as caught:
            await toys.generate("hello", max_tokens=30)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert_right([await toys.generate("hello", max_tokens=10, sampling={"seed": 0})], 10)


async def test_requests_wait_for_pages_in_their_order() -> None:
    verifier = slow(ToyVerifier(pages=8))  # two requests of 64 tokens
    async with cluster(verifier, ToyDraft()) as toys:
        results = await streams(toys, 7, 58)
        assert_right(results, 58)
        assert max(result.finished.timings.queue_seconds for result in results) > 0.01
    assert not verifier.open


async def test_a_moved_stream_is_not_overtaken_by_requests_that_fit_sooner() -> None:
    first, second = slow(ToyVerifier("v0", pages=8)), slow(ToyVerifier("v1", pages=8))
    async with cluster(first) as toys:
        moved = asyncio.create_task(toys.generate("hello", max_tokens=114, sampling={"seed": 0}))  # all of v0's pages
        await until(lambda: len(first.steps) > 5)
        await toys.add(second)
        await until(lambda: "v1" in toys.engine.verifiers.links)
        small = [asyncio.create_task(toys.generate("hello", max_tokens=40, sampling={"seed": s})) for s in (1, 2)]
        await until(lambda: len(second.open) == 2)
        await first.kill()
        later = [asyncio.create_task(toys.generate("hello", max_tokens=40, sampling={"seed": s})) for s in (3, 4, 5)]
        result = await moved
        assert_right([result], 114)
        assert not any(task.done() for task in later)
        await asyncio.gather(*small, *later)


async def test_out_of_pages_at_open_is_no_error() -> None:
    verifier = ToyVerifier()
    verifier.refuse_next_open = OutOfPages("another router was faster")
    async with cluster(verifier) as toys:
        assert_right(await streams(toys, 2, 10), 10)


async def test_a_whole_call_refused_moves_its_sequences() -> None:
    verifier = ToyVerifier()
    verifier.refuse_next_open = Unavailable("draining")
    async with cluster(verifier) as toys:
        assert_right(await streams(toys, 2, 10), 10)


# ---------------------------------------------------------------- draft workers


async def test_a_dead_draft_worker_costs_only_drafts() -> None:
    verifier, drafter = slow(ToyVerifier()), ToyDraft()
    async with cluster(verifier, drafter) as toys:
        running = asyncio.create_task(streams(toys, 4, 80))
        await until(lambda: drafter.proposals > 10)
        await drafter.kill()
        results = await running
    assert_right(results, 80)
    for result in results:
        counts = result.finished.speculation
        assert counts.missed_rounds > 0
        assert counts.accepted > 0
        assert counts.drafter


async def test_a_second_draft_worker_takes_a_fair_share_of_running_streams() -> None:
    verifier, first, second = slow(ToyVerifier()), ToyDraft("d0"), ToyDraft("d1")
    async with cluster(verifier, first) as toys:
        running = asyncio.create_task(streams(toys, 8, 150))
        await until(lambda: len(first.attached) == 8)
        await toys.add(second)
        await until(lambda: len(first.attached) == len(second.attached) == 4)
        await until(lambda: second.proposals > 10)
        assert_right(await running, 150)
        await until(lambda: not first.attached and not second.attached)


async def test_a_draining_draft_worker_is_left_at_once() -> None:
    verifier, first, second = slow(ToyVerifier()), ToyDraft("d0"), ToyDraft("d1")
    async with cluster(verifier, first, second) as toys:
        running = asyncio.create_task(streams(toys, 6, 150))
        await until(lambda: len(first.attached) == len(second.attached) == 3)
        first.draining = True
        await until(lambda: not first.attached and len(second.attached) == 6)
        assert not running.done()
        results = await running
    assert_right(results, 150)
    assert all(result.finished.speculation.missed_rounds < 15 for result in results)


async def test_a_late_draft_worker_costs_one_wait_and_no_token() -> None:
    drafter = ToyDraft()
    async with cluster(ToyVerifier(), drafter, options=by_fives(patience=FAST)) as toys:
        warm = await toys.generate("hello", max_tokens=10)
        assert warm.finished.speculation.accepted
        running = asyncio.create_task(streams(toys, 2, 60))
        await until(lambda: drafter.proposals > 6)
        drafter.hang = True
        results = await running
        assert_right(results, 60)
        assert all(result.finished.speculation.missed_rounds > 5 for result in results)
        drafter.hang = False
        await until(lambda: not drafter.attached)


async def test_rounds_go_on_while_a_draft_worker_owes_an_answer() -> None:
    verifier, drafter = slow(ToyVerifier()), ToyDraft()
    options = by_fives(patience=Patience(features=0.05, round=0.02, worker=60.0))
    async with cluster(verifier, drafter, options=options) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=300, sampling={"seed": 0}))
        await until(lambda: drafter.proposals > 2)
        drafter.hang = True
        link = toys.engine.drafters.links["draft-0"]
        await until(lambda: link.late is not None)
        before = len(verifier.steps)
        await until(lambda: len(verifier.steps) > before + 10)
        assert link.late is not None  # still the same one: nothing more was asked
        drafter.hang = False
        had = drafter.proposals
        await until(lambda: drafter.proposals > had + 3)
        assert_right([await running], 300)


async def test_missing_features_cost_only_drafts() -> None:
    drafter = ToyDraft()
    drafter.features_missing = True
    async with cluster(slow(ToyVerifier()), drafter) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=80, sampling={"seed": 0}))
        await until(lambda: drafter.refusals)
        drafter.features_missing = False
        result = await running
    assert_right([result], 80)
    counts = result.finished.speculation
    assert counts.missed_rounds > 0
    assert counts.accepted > 0


async def test_a_drafter_that_does_not_fit_is_not_tried_again() -> None:
    wrong = ToyDraft("d0")
    wrong.mismatch = True
    stranger = ToyDraft("d1", drafter=dataclasses.replace(DRAFTER, model_fingerprint="another target"))
    small = ToyDraft("d2", drafter=dataclasses.replace(DRAFTER, vocab_size=VOCAB - 1))
    async with cluster(ToyVerifier(), wrong, stranger, small) as toys:
        assert_right(await streams(toys, 3, 20), 20)
        assert toys.engine.drafters.links["d0"].refused == {MODEL.model_fingerprint}
    assert not stranger.attached
    assert not small.attached


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": (VOCAB + 5,), "confidences": (0.5,)},
        {"tokens": tuple(range(40)), "confidences": (0.5,) * 40},
        {"committed_len": 3},
    ],
)
async def test_a_broken_proposal_is_not_verified(change: dict[str, Any]) -> None:
    drafter = ToyDraft()
    drafter.alter = lambda proposal: dataclasses.replace(proposal, **change)
    async with cluster(ToyVerifier(), drafter) as toys:
        result = await toys.generate("hello", max_tokens=20, sampling={"seed": 0})
    assert_right([result], 20)
    assert result.finished.speculation.verified == 0
    assert result.finished.speculation.missed_rounds == 18


async def test_a_drafter_that_lost_a_sequence_gets_it_again() -> None:
    drafter = ToyDraft()
    async with cluster(slow(ToyVerifier()), drafter) as toys:
        running = asyncio.create_task(toys.generate("hello", max_tokens=100, sampling={"seed": 0}))
        await until(lambda: drafter.proposals > 3)
        drafter.attached.clear()
        before = drafter.proposals
        await until(lambda: drafter.proposals > before + 3)
        assert_right([await running], 100)


# ---------------------------------------------------------------- the store


async def test_an_emptied_store_disturbs_nothing() -> None:
    verifier, drafter = slow(ToyVerifier()), ToyDraft()
    async with cluster(verifier, drafter) as toys:
        running = asyncio.create_task(streams(toys, 3, 60))
        await until(lambda: len(verifier.steps) > 5)
        toys.board.emptied = True
        await until(lambda: not toys.engine.verifiers.links["verify-0"].listed)
        assert_right(await running, 60)
        assert_right(await streams(toys, 2, 10), 10)  # new ones too: there is no better place
        assert not any(result.finished.speculation.missed_rounds > 30 for result in await streams(toys, 2, 60))


async def test_everything_at_once() -> None:
    """Workers of both kinds come, die and drain under load."""
    first, second = slow(ToyVerifier("v0")), slow(ToyVerifier("v1"))
    d0, d1 = ToyDraft("d0"), ToyDraft("d1")
    async with cluster(first, d0) as toys:
        running = asyncio.create_task(streams(toys, 16, 150))
        await until(lambda: len(first.steps) > 5)
        await toys.add(d1)
        await toys.add(second)
        await until(lambda: d1.proposals > 5)
        await d0.kill()
        first.draining = True
        await until(lambda: not first.open)
        third = slow(ToyVerifier("v2"))
        await toys.add(third)
        await until(lambda: "v2" in toys.engine.verifiers.links)
        await second.kill()
        assert_right(await running, 150)
        await until(lambda: not third.open and not d1.attached)
        assert len(toys.engine.active) == 0
