"""Blocks drafted unasked: as soon as features come, while somebody wants them, and the same as when asked for."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.drafting import GREEDY, attach, feed, item, key_of, make_drafter, make_engine, make_features, token_at
from support.scripted_verifier import ScriptedVerifier, running

from dspark.kernels import TORCH
from dspark.messages import AttachSequence, Proposal, ProposeItem, ProposeResult, SequenceKey
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.draft.metrics import DraftMetrics
from services.draft.offer import TapOffer
from services.draft.worker import DraftWorker

FEATURES = make_features(300)
A, B = key_of("a"), key_of("b")


class Rig:
    """A worker that stays with what it is told to, and what it sent unasked."""

    def __init__(self, worker: DraftWorker, verifier: ScriptedVerifier) -> None:
        self.worker = worker
        self.verifier = verifier
        self.came: asyncio.Queue[ProposeResult] = asyncio.Queue()

    async def ask(self, *items: ProposeItem) -> list[Proposal]:
        return list((await self.worker.propose(items, 5.0, self.came.put_nowait)).proposals)

    async def next(self) -> list[Proposal]:
        return list((await asyncio.wait_for(self.came.get(), 5.0)).proposals)

    async def nothing_comes(self) -> None:
        await asyncio.sleep(0.1)
        assert self.came.empty()


@asynccontextmanager
async def rig(engine: DraftEngine | None = None, *, length: int = 20, max_len: int = 400) -> AsyncIterator[Rig]:
    drafter, verifier = make_drafter(), ScriptedVerifier()
    for key in (A, B):
        verifier.open(key, FEATURES, length)
    offer = TapOffer.of(drafter, Path("tiny"))
    async with (
        running(verifier) as address,
        DraftWorker(engine or make_engine(drafter), offer, metrics=DraftMetrics()) as worker,
    ):
        requests = [AttachSequence(key, address, GREEDY, max_len, request_id="r") for key in (A, B)]
        assert all(answer.error is None for answer in await worker.attach(requests))
        yield Rig(worker, verifier)


def steady(key: SequenceKey, committed_len: int, **fields: Any) -> ProposeItem:
    return replace(item(key, committed_len, anchor=token_at(committed_len - 1), **fields), stay=True)


def alone(key: SequenceKey, length: int, count: int = 5) -> tuple[int, ...]:
    """What a fresh engine drafts behind so many positions."""
    engine = make_engine(make_drafter())
    attach(engine, key)
    feed(engine, key, FEATURES[:length])
    return engine.propose([item(key, length + 1, anchor=token_at(length), max_tokens=count)]).proposals[0].tokens


async def test_blocks_follow_the_features() -> None:
    async with rig() as own:
        first = await own.ask(steady(A, 21, max_tokens=3))
        assert [(p.tokens, p.stays) for p in first] == [(alone(A, 20, 3), True)]
        for length in (22, 23, 27):
            own.verifier.grow(A, length)
            [block] = await own.next()
            assert (block.key, block.committed_len, block.stays) == (A, length + 1, True)
            assert block.tokens == alone(A, length, 3)
        await own.nothing_comes()


async def test_what_comes_in_one_message_is_one_batch_and_one_reply() -> None:
    async with rig() as own:
        await own.ask(steady(A, 21), steady(B, 21))
        own.verifier.grow(A, 23)
        own.verifier.grow(B, 22)
        blocks = await own.next()
        assert [(p.key, p.tokens) for p in blocks] == [(A, alone(A, 23)), (B, alone(B, 22))]


def order(key: SequenceKey, tokens: int, committed_len: int = 21) -> ProposeItem:
    return ProposeItem(key, committed_len, token_at(committed_len - 1), tokens, stay=tokens > 0, later=True)


@pytest.mark.parametrize("end", ["ask", "order", "detach"])
async def test_an_order_ends(end: str) -> None:
    async with rig() as own:
        await own.ask(steady(A, 21), steady(B, 21))
        if end == "detach":
            own.worker.detach([A])
        else:
            [answer] = await own.ask(item(A, 21, anchor=token_at(20)) if end == "ask" else order(A, 0))
            assert not answer.stays
            assert len(answer.tokens) == (5 if end == "ask" else 0)
        own.verifier.grow(A, 25)
        own.verifier.grow(B, 25)
        assert [p.key for p in await own.next()] == [B]
        await own.nothing_comes()


async def test_an_order_changes_what_comes_and_waits_for_nothing() -> None:
    async with rig() as own:
        await own.ask(steady(A, 21, max_tokens=3))
        for length, count in ((23, 5), (25, 1)):
            [answer] = await own.ask(order(A, count, length - 1))
            assert (answer.error, answer.stays, answer.tokens) == (None, True, ())
            own.verifier.grow(A, length)
            assert [p.tokens for p in await own.next()] == [alone(A, length, count)]


async def test_an_order_comes_first_where_no_block_was_asked_for() -> None:
    async with rig() as own:
        [here, unknown] = await own.ask(order(A, 3), order(key_of("z"), 3))
        assert here.stays
        assert not unknown.stays
        await own.nothing_comes()
        own.verifier.grow(A, 25)
        assert [p.tokens for p in await own.next()] == [alone(A, 25, 3)]


async def test_an_order_that_comes_behind_the_features_is_not_too_late() -> None:
    async with rig() as own:
        own.verifier.grow(A, 25)
        await own.ask(steady(B, 21))
        await asyncio.sleep(0.05)
        await own.ask(order(A, 3))
        assert [p.tokens for p in await own.next()] == [alone(A, 25, 3)]
        await own.ask(order(A, 2, 26))  # and none twice
        await own.nothing_comes()


async def test_a_block_asked_for_is_not_drafted_twice() -> None:
    async with rig() as own:
        await own.ask(steady(A, 21))
        asked = asyncio.create_task(own.ask(steady(A, 24)))
        await asyncio.sleep(0.05)
        own.verifier.grow(A, 23)
        assert [p.tokens for p in await asked] == [alone(A, 23)]
        await own.nothing_comes()
        own.verifier.grow(A, 24)
        assert [p.committed_len for p in await own.next()] == [25]


async def test_nothing_is_drafted_past_a_sequences_end() -> None:
    async with rig(max_len=25) as own:
        await own.ask(steady(A, 21))
        own.verifier.grow(A, 23)
        assert [p.committed_len for p in await own.next()] == [24]
        own.verifier.grow(A, 24)
        await own.nothing_comes()


async def test_without_a_listener_nobody_stays() -> None:
    async with rig() as own:
        result = await own.worker.propose([steady(A, 21)], 5.0)
        assert [p.stays for p in result.proposals] == [False]
        own.verifier.grow(A, 25)
        await own.nothing_comes()


class FailingEngine(DraftEngine):
    """Fails once, at whatever it is asked next."""

    failing = False

    def compute(self, items: Sequence[ProposeItem]) -> tuple[ProposeResult, Callable[[], None]]:
        if self.failing:
            self.failing = False
            raise RuntimeError("out of luck")
        return super().compute(items)


async def test_a_lost_block_is_not_delivered_and_the_next_one_is() -> None:
    engine = FailingEngine(make_drafter(), DraftChooser(), TORCH, context_positions=4096)
    async with rig(engine) as own:
        await own.ask(steady(A, 21))
        engine.failing = True
        own.verifier.grow(A, 22)
        await own.nothing_comes()
        own.verifier.grow(A, 24)
        assert [(p.committed_len, p.tokens) for p in await own.next()] == [(25, alone(A, 24))]


class Learning(DraftEngine):
    """Notes when blocks were learned of."""

    learned = 0

    def compute(self, items: Sequence[ProposeItem]) -> tuple[ProposeResult, Callable[[], None]]:
        result, learn = super().compute(items)

        def noted() -> None:
            learn()
            self.learned += 1

        return result, noted


async def test_blocks_are_told_before_they_are_learned_of_and_all_of_them_are() -> None:
    engine = Learning(make_drafter(), DraftChooser(), TORCH, context_positions=4096)
    async with rig(engine) as own:
        for asked in range(1, 6):
            await own.ask(item(A, 21))
            assert engine.learned < asked
        async with asyncio.timeout(5):
            while engine.learned < 5:
                await asyncio.sleep(0.001)
