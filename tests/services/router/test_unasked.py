"""Blocks that drafters send unasked: used where they fit, missed at little cost, and ended when nobody wants them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from support.toys import BOS, Cluster, ToyDraft, ToyVerifier, cluster, expected, ids_of, letters, until

from dspark.messages import Proposal, ProposeResult, SequenceKey
from dspark.v1.types_pb2 import SAMPLING_MODE_REJECTION
from services.router.unasked import Unasked

KEY = SequenceKey("s", 1)


def said(text: str, count: int) -> list[int]:
    return expected(letters, [BOS, *ids_of(text)], 5, count)


@asynccontextmanager
async def staying(**faults: bool) -> AsyncIterator[tuple[Cluster, ToyDraft]]:
    """A cluster whose drafter stays with sequences when told to."""
    verifier, draft = ToyVerifier(), ToyDraft()
    draft.stays = True
    verifier.on_commit = draft.committed
    for name, value in faults.items():
        setattr(draft, name, value)
    async with cluster(verifier, draft) as made:
        yield made, draft


def blocks(made: Cluster, fate: str) -> float:
    name, labels = "dspark_router_unasked_blocks_total", {"fate": fate}
    return made.engine.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("mode", [0, SAMPLING_MODE_REJECTION])
async def test_a_steady_stream_is_drafted_for_unasked(mode: int) -> None:
    async with staying() as (made, draft):
        results = await asyncio.gather(
            *(made.generate("hello" * n, max_tokens=60, sampling={"mode": mode, "temperature": 1.0}) for n in (1, 2, 3))
        )
        for n, result in zip((1, 2, 3), results, strict=True):
            assert result.ids == said("hello" * n, 60)
            counts = result.finished.speculation
            assert 0 < counts.accepted < counts.verified
        asked = draft.proposals - draft.unasked
        assert draft.unasked > 5 * asked > 0
        assert blocks(made, "came") == draft.unasked
        assert blocks(made, "used") >= draft.unasked - 2 * len(results)  # of the last round nobody uses any
        await until(lambda: not draft.attached)
        assert not draft.staying
        assert not made.engine.drafters.links["draft-0"].unasked._latest


async def test_a_block_that_does_not_come_is_asked_for_and_costs_one_wait() -> None:
    async with staying(silent=True) as (made, draft):
        began = time.monotonic()
        result = await made.generate("hello", max_tokens=60)
        assert result.ids == said("hello", 60)
        assert 0.2 < time.monotonic() - began < 1.5  # it is not relied on again at once
        assert draft.unasked == blocks(made, "used") == 0
        assert result.finished.speculation.missed_rounds <= 3  # before it was attached: toys take no time for a round


@pytest.mark.parametrize(
    "alter",
    [
        lambda p: replace(p, committed_len=p.committed_len + 1),
        lambda p: replace(p, key=SequenceKey(p.key.sequence_id, p.key.epoch + 1)),
        lambda p: replace(p, tokens=p.tokens[:1] + (1 << 20,) * (len(p.tokens) - 1)),
        lambda p: replace(p, tokens=p.tokens * 2, confidences=p.confidences * 2),
        lambda p: replace(p, confidences=p.confidences[1:]),
    ],
)
async def test_broken_blocks_break_no_stream(alter: Callable[[Proposal], Proposal]) -> None:
    async with staying() as (made, draft):
        seen = 0

        def sometimes(proposal: Proposal) -> Proposal:
            nonlocal seen
            seen += 1
            return alter(proposal) if seen == 6 else proposal

        draft.alter = sometimes
        result = await made.generate("hello", max_tokens=60)
        assert result.ids == said("hello", 60)
        assert draft.unasked > 0
        assert seen >= 6


async def test_nobody_stays_with_who_is_not_asked_for() -> None:
    async with staying() as (made, draft):
        left = asyncio.create_task(made.generate("hello", max_tokens=400))
        await until(lambda: draft.unasked > 3)
        sequence = next(iter(made.engine.drafters.links["draft-0"].sequences.values()))
        sequence.request = replace(sequence.request, speculation=False)
        await until(lambda: not draft.staying)
        unasked, steps = draft.unasked, len(next(iter(made.board.workers)).steps)  # type: ignore[attr-defined]
        result = await left
        assert result.ids == said("hello", 400)
        assert draft.unasked == unasked
        assert len(made.board.workers[0].steps) > steps  # type: ignore[attr-defined]


async def test_who_ends_by_a_stop_string_holds_nobody_up() -> None:
    async with staying() as (made, _):
        began = time.monotonic()
        alone = await made.generate("hello", max_tokens=300)
        usual = time.monotonic() - began
        began = time.monotonic()
        steady = asyncio.create_task(made.generate("hello", max_tokens=300))
        for _ in range(6):
            stopped = await made.generate("hello", max_tokens=60, stop=[alone.text[20:24]])
            assert 20 <= len(stopped.ids) < 60
        assert (await steady).ids == alone.ids
        assert time.monotonic() - began < 2 * usual + 0.5  # six waits of 0.2 s would be more


async def test_a_drafter_that_comes_is_stayed_with_and_one_that_goes_is_not_waited_for() -> None:
    async with staying() as (made, draft):
        left = asyncio.create_task(made.generate("hello", max_tokens=400))
        await until(lambda: draft.unasked > 3)
        await draft.kill()
        other = ToyDraft("draft-1")
        other.stays = True
        made.board.workers[0].on_commit = other.committed  # type: ignore[attr-defined]
        await made.add(other)
        await until(lambda: other.unasked > 3 or left.done())
        assert (await left).ids == said("hello", 400)
        assert other.unasked > 3


async def test_a_block_is_for_one_length_and_kept_until_the_next() -> None:
    unasked = Unasked(lambda key: key == KEY)
    block = Proposal(KEY, 7, (1, 2, 3), (0.5, 0.5, 0.5))
    unasked.add(ProposeResult((block, replace(block, key=SequenceKey("gone", 0)))))
    assert unasked.find(SequenceKey("gone", 0), 7) is None
    assert unasked.find(KEY, 8) is None
    await unasked.wait({KEY: 7}, 5.0)
    came = unasked.find(KEY, 7)
    assert came is not None
    assert came.cut(2).proposal == replace(block, tokens=(1, 2), confidences=(0.5, 0.5))
    assert came.cut(9) is came
    unasked.add(ProposeResult((replace(block, committed_len=9),)))
    assert unasked.find(KEY, 7) is None
    unasked.forget([KEY])
    assert unasked.find(KEY, 9) is None


async def test_a_wait_ends_with_the_last_block_or_its_time() -> None:
    members = {KEY, other := SequenceKey("t", 1)}
    unasked = Unasked(members.__contains__)
    wait = asyncio.create_task(unasked.wait({KEY: 7, other: 9}, 5.0))
    unasked.add(ProposeResult((Proposal(KEY, 7),)))
    await asyncio.sleep(0.02)
    assert not wait.done()
    unasked.add(ProposeResult((Proposal(other, 9),)))
    await asyncio.wait_for(wait, 1.0)
    began = time.monotonic()
    await unasked.wait({KEY: 8}, 0.05)
    assert 0.04 < time.monotonic() - began < 1.0


async def test_nobody_waits_for_who_has_left() -> None:
    members = {KEY}
    unasked = Unasked(members.__contains__)
    wait = asyncio.create_task(unasked.wait({KEY: 7}, 30.0))
    await asyncio.sleep(0.02)
    assert not wait.done()
    members.clear()
    unasked.forget([KEY])
    await asyncio.wait_for(wait, 1.0)
