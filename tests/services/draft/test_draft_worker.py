"""The draft worker with features over real gRPC: who waits for what, what breaks and what heals."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drafting import GREEDY, attach, block_of, feed, item, key_of, make_drafter, make_engine, make_features
from support.scripted_verifier import MODEL, ScriptedVerifier, running

from dspark.errors import (
    FeaturesMissing,
    InternalError,
    InvalidRequest,
    Mismatch,
    OutOfPages,
    StaleMessage,
    Unavailable,
    UnknownSequence,
)
from dspark.kernels import TORCH
from dspark.messages import AttachSequence, FeatureBlock, Proposal, ProposeItem, SequenceKey
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.draft.metrics import DraftMetrics
from services.draft.ngram import PromptLookup
from services.draft.offer import TapOffer
from services.draft.worker import DraftWorker

FEATURES = make_features(300)
LOOKUP = PromptLookup(vocab_size=512)
A, B, C = key_of("a"), key_of("b"), key_of("c")


@asynccontextmanager
async def worker_of(engine: DraftEngine | None = None, **settings: Any) -> AsyncIterator[DraftWorker]:
    drafter = make_drafter()
    offer = settings.pop("offer", TapOffer.of(drafter, Path("tiny")))
    metrics = settings.pop("metrics", DraftMetrics())
    async with DraftWorker(engine or make_engine(drafter), offer, metrics=metrics, **settings) as worker:
        yield worker


def asking(key: SequenceKey, address: str, *, max_len: int = 400) -> AttachSequence:
    return AttachSequence(key, address, GREEDY, max_len, request_id="r")


async def attached(worker: DraftWorker, address: str, *keys: SequenceKey) -> None:
    answers = await worker.attach([asking(key, address) for key in keys])
    assert [(answer.key, answer.error) for answer in answers] == [(key, None) for key in keys]


def drafted_alone(key: SequenceKey, length: int) -> Proposal:
    """What a fresh engine with these features drafts."""
    engine = make_engine(make_drafter())
    attach(engine, key)
    feed(engine, key, FEATURES[:length])
    return engine.propose([item(key, length + 1)]).proposals[0]


async def tokens(worker: DraftWorker, *items: ProposeItem, wait: float = 5.0) -> Sequence[tuple[int, ...]]:
    result = await worker.propose(items, wait)
    assert [proposal.error for proposal in result.proposals] == [None] * len(items)
    return [proposal.tokens for proposal in result.proposals]


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_features_flow_and_blocks_are_the_engines() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 20)
    verifier.open(B, FEATURES, 270)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A, B)
        first = await tokens(worker, item(A, 21), item(B, 271))
        assert first == [drafted_alone(A, 20).tokens, drafted_alone(B, 270).tokens]
        verifier.grow(A, 23)
        assert await tokens(worker, item(A, 24)) == [drafted_alone(A, 23).tokens]
        assert len(verifier.registered) == 1
        assert verifier.subscribed == [(A, 0), (B, 0)]
        worker.detach([A, B])
        await until(lambda: len(verifier.unsubscribed) == 2)
        assert worker.load().running == 0


async def test_an_attachment_replaced_while_it_was_made_leaves_nothing_behind() -> None:
    verifier, later = ScriptedVerifier(), SequenceKey(A.sequence_id, A.epoch + 1)
    verifier.open(later, FEATURES, 20)
    async with running(verifier) as address, worker_of() as worker:
        old, new = await asyncio.gather(
            worker.attach([asking(A, "127.0.0.1:1")]), worker.attach([asking(later, address)])
        )
        assert isinstance(old[0].error, StaleMessage)
        assert new[0].error is None
        assert await tokens(worker, item(later, 21)) == [drafted_alone(later, 20).tokens]
        assert list(worker._intake._sources) == [later]
        assert "127.0.0.1:1" not in worker._intake._links


@asynccontextmanager
async def busy(worker: DraftWorker) -> AsyncIterator[None]:
    """The engine's thread has something else to do."""
    let_go = threading.Event()
    call = worker._jobs.submit(let_go.wait)
    try:
        yield
    finally:
        let_go.set()
        await call


async def test_who_comes_back_while_the_engine_is_busy_is_not_forgotten() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 20)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        async with busy(worker):
            worker.detach([A])
            await attached(worker, address, A)
        assert await tokens(worker, item(A, 21)) == [drafted_alone(A, 20).tokens]


async def test_room_is_free_at_once_while_the_engine_is_busy() -> None:
    verifier = ScriptedVerifier()
    for key in (A, B):
        verifier.open(key, FEATURES, 20)
    async with running(verifier) as address, worker_of(make_engine(make_drafter(), positions=420)) as worker:
        await attached(worker, address, A)
        async with busy(worker):
            (answer,) = await worker.attach([asking(B, address)])
            assert isinstance(answer.error, OutOfPages)  # there is room for one
            worker.detach([A])
            await attached(worker, address, B)
        assert await tokens(worker, item(B, 21)) == [drafted_alone(B, 20).tokens]


async def test_a_block_waits_for_its_features() -> None:
    verifier, key = ScriptedVerifier(), A
    verifier.open(key, FEATURES, 5)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, key)
        call = asyncio.create_task(worker.propose([item(key, 31)], 5.0))
        for length in (10, 20, 29):
            await asyncio.sleep(0.02)
            verifier.grow(key, length)
        await asyncio.sleep(0.05)
        assert not call.done()
        verifier.grow(key, 30)
        result = await call
        assert result.proposals[0].tokens == drafted_alone(key, 30).tokens
        assert 0.1 < result.feature_wait_seconds < 5
        assert result.total_seconds >= result.forward_seconds > 0


async def test_a_straggler_holds_the_others_no_longer_than_the_wait() -> None:
    verifier, metrics = ScriptedVerifier(), DraftMetrics()
    for key in (A, B, C):
        verifier.open(key, FEATURES, 10)
    async with running(verifier) as address, worker_of(metrics=metrics) as worker:
        await attached(worker, address, A, B, C)
        began = time.monotonic()
        result = await worker.propose([item(A, 11), item(B, 40), item(C, 11), item(key_of("z"), 3)], 0.2)
        assert 0.19 < time.monotonic() - began < 2
        errors = [type(proposal.error) for proposal in result.proposals]
        assert errors == [type(None), FeaturesMissing, type(None), UnknownSequence]
        assert [proposal.key for proposal in result.proposals] == [A, B, C, key_of("z")]
        assert result.proposals[0].tokens == drafted_alone(A, 10).tokens
        assert metrics.registry.get_sample_value("dspark_draft_missed_total") == 1
        assert metrics.registry.get_sample_value("dspark_draft_proposals_total") == 2
        assert metrics.registry.get_sample_value("dspark_spec_decode_num_draft_tokens_total") == 10
        named = {"error": "UnknownSequence"}
        assert metrics.registry.get_sample_value("dspark_refused_items_total", named) == 1
        quick = await worker.propose([item(B, 40)], 0.0)
        assert isinstance(quick.proposals[0].error, FeaturesMissing)
        assert quick.feature_wait_seconds < 0.1


async def test_stale_items_are_refused_at_once() -> None:
    verifier = ScriptedVerifier()
    verifier.open(key_of("a", 2), FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, key_of("a", 2))
        await tokens(worker, item(key_of("a", 2), 11))
        began = time.monotonic()
        result = await worker.propose([item(key_of("a", 1), 11), item(key_of("a", 2), 5)], 5.0)
        assert [type(proposal.error) for proposal in result.proposals] == [StaleMessage] * 2
        assert time.monotonic() - began < 2


async def test_detaching_ends_the_wait() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        call = asyncio.create_task(worker.propose([item(A, 50)], 5.0))
        await asyncio.sleep(0.05)
        worker.detach([A])
        async with asyncio.timeout(2):
            assert isinstance((await call).proposals[0].error, UnknownSequence)


async def test_a_gap_is_pulled_from_our_position() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        await tokens(worker, item(A, 11))
        await asyncio.sleep(0.25)  # pulls close to each other are one
        verifier.grow(A, 20, lose=4)
        assert await tokens(worker, item(A, 21)) == [drafted_alone(A, 20).tokens]
        assert verifier.subscribed == [(A, 0), (A, 10)]


async def test_what_was_lost_at_the_end_is_pulled_when_it_is_missed() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        await tokens(worker, item(A, 11))
        await asyncio.sleep(0.25)
        verifier.grow(A, 20, lose=10)
        late = await worker.propose([item(A, 21)], 0.1)
        assert isinstance(late.proposals[0].error, FeaturesMissing)
        assert await tokens(worker, item(A, 21)) == [drafted_alone(A, 20).tokens]
        assert verifier.subscribed == [(A, 0), (A, 10)]


async def test_a_sequence_may_open_at_the_verifier_after_us() -> None:
    verifier = ScriptedVerifier()
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        await until(lambda: len(verifier.subscribed) >= 2)
        verifier.open(A, FEATURES, 10)
        assert await tokens(worker, item(A, 11)) == [drafted_alone(A, 10).tokens]


async def test_a_restarted_verifier_is_introduced_to_us_again() -> None:
    first, second = ScriptedVerifier(), ScriptedVerifier()
    first.open(A, FEATURES, 10)
    second.open(A, FEATURES, 30)
    async with worker_of() as worker:
        async with running(first) as address:
            await attached(worker, address, A)
            await tokens(worker, item(A, 11))
        late = await worker.propose([item(A, 31)], 0.05)
        assert isinstance(late.proposals[0].error, FeaturesMissing)
        async with running(second, address):
            assert await tokens(worker, item(A, 31)) == [drafted_alone(A, 30).tokens]
            assert len(second.registered) == 1
            assert second.subscribed == [(A, 10)]


async def test_a_forgotten_tap_is_registered_again() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        await tokens(worker, item(A, 11))
        verifier.forget_taps()
        verifier.tell(A, Mismatch("no such tap"))
        verifier.open(B, FEATURES, 10)
        await until(lambda: len(verifier.registered) == 1)
        await attached(worker, address, B)
        verifier.grow(A, 20)
        assert await tokens(worker, item(A, 21), item(B, 11)) == [
            drafted_alone(A, 20).tokens,
            drafted_alone(B, 10).tokens,
        ]


async def test_broken_feature_bytes_are_not_believed() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        await tokens(worker, item(A, 11))
        verifier.send(FeatureBlock(A, 10, 5, b"\0" * 17))
        verifier.grow(A, 15)
        assert await tokens(worker, item(A, 16)) == [drafted_alone(A, 15).tokens]


async def test_prompt_lookup_wants_ids_and_no_tap() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, torch.empty(300, 0, dtype=torch.bfloat16), 40)
    offer, engine = TapOffer.of(LOOKUP, Path("ngram")), make_engine(LOOKUP)
    async with running(verifier) as address, worker_of(engine, offer=offer) as worker:
        await attached(worker, address, A)
        assert await tokens(worker, item(A, 41)) == [()]  # no id of the first 512 comes twice
        verifier.grow(A, 45)
        assert await tokens(worker, item(A, 46)) == [()]
        assert verifier.taps_wanted == {""}
        assert verifier.registered == []
        (refused,) = await worker.attach([asking(B, "127.0.0.1:1")])
        assert isinstance(refused.error, Unavailable)
    stranger = ScriptedVerifier(replace(MODEL, vocab_size=600))
    async with running(stranger) as address, worker_of(make_engine(LOOKUP), offer=offer) as worker:
        (refused,) = await worker.attach([asking(A, address)])
        assert isinstance(refused.error, Mismatch)
        assert "600" in str(refused.error)


async def test_blocks_without_their_ids_are_not_believed() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        await tokens(worker, item(A, 11))
        verifier.send(replace(block_of(A, -FEATURES, 10, 15), token_ids=(1, 2)))
        verifier.grow(A, 15)
        assert await tokens(worker, item(A, 16)) == [drafted_alone(A, 15).tokens]


@pytest.mark.parametrize(
    ("model", "drafter", "both"),
    [
        ({}, {"model_fingerprint": "beef"}, ("beef", "f00d")),
        ({"vocab_size": 600}, {}, ("512", "600")),
        ({"hidden_size": 32}, {}, ("64", "32")),
        ({"num_layers": 4}, {}, ("[-1, 1, 3]", "-1 to 2")),
    ],
)
async def test_a_verifier_that_does_not_fit_is_refused_at_attach(
    model: dict[str, Any], drafter: dict[str, Any], both: tuple[str, str]
) -> None:
    verifier = ScriptedVerifier(replace(MODEL, **model))
    offer = TapOffer.of(make_drafter(**drafter), Path("tiny"))
    async with running(verifier) as address, worker_of(offer=offer) as worker:
        (answer,) = await worker.attach([asking(A, address)])
        assert isinstance(answer.error, Mismatch)
        for value in both:
            assert value in str(answer.error)
        assert worker.load().running == 0
        await until(lambda: worker.load().free_pages == worker.load().total_pages)
        assert verifier.registered == []


async def test_attaching_without_a_verifier_or_room_is_refused() -> None:
    async with worker_of(make_engine(make_drafter(), positions=500), connect_seconds=0.3) as worker:
        began = time.monotonic()
        answers = await worker.attach(
            [
                asking(A, "127.0.0.1:9", max_len=40),
                asking(B, "nowhere", max_len=40),
                asking(C, "127.0.0.1:9", max_len=4000),
            ]
        )
        assert [type(answer.error) for answer in answers] == [Unavailable, InvalidRequest, OutOfPages]
        assert "no features from verify worker 127.0.0.1:9 within 0.3 s: " in str(answers[0].error)
        assert time.monotonic() - began < 2
        assert worker.load().running == 0
        await until(lambda: worker.load().free_pages == worker.load().total_pages)


async def test_a_sequence_moves_with_its_epoch() -> None:
    old, new = ScriptedVerifier(), ScriptedVerifier()
    old.open(A, FEATURES, 10)
    new.open(key_of("a", 1), FEATURES, 20)
    async with running(old) as before, running(new) as after, worker_of() as worker:
        await attached(worker, before, A)
        await tokens(worker, item(A, 11))
        await attached(worker, after, key_of("a", 1))
        assert await tokens(worker, item(key_of("a", 1), 21)) == [drafted_alone(A, 20).tokens]
        result = await worker.propose([item(A, 11)], 0.0)
        assert isinstance(result.proposals[0].error, StaleMessage)
        (answer,) = await worker.attach([asking(A, before)])
        assert isinstance(answer.error, StaleMessage)
        worker.detach([A])  # the former epoch: means nothing any more
        assert worker.load().running == 1


async def test_draining_takes_nothing_new_and_ends_when_empty() -> None:
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of() as worker:
        await attached(worker, address, A)
        drain = asyncio.create_task(worker.drain(10.0))
        await asyncio.sleep(0.05)
        assert worker.load().draining
        (answer,) = await worker.attach([asking(B, address)])
        assert isinstance(answer.error, Unavailable)
        assert await tokens(worker, item(A, 11)) == [drafted_alone(A, 10).tokens]
        assert not drain.done()
        worker.detach([A])
        async with asyncio.timeout(1):
            await drain
        await worker.drain(0.0)


async def test_known_verifiers_are_connected_ahead_of_need_and_left_when_gone() -> None:
    verifier, present = ScriptedVerifier(), set[str]()
    async with running(verifier) as address, worker_of(present=lambda: present, linger_seconds=0.0) as worker:
        assert worker.load().running == 0
        present.add(address)
        await until(lambda: len(verifier.registered) == 1)
        present.clear()
        await until(lambda: not verifier._streams)


class FailingEngine(DraftEngine):
    """Fails once, at whatever it is asked next."""

    failing = False

    def append_features(self, blocks: Sequence[FeatureBlock]) -> list[SequenceKey]:
        if self.failing:
            self.failing = False
            raise RuntimeError("out of luck")
        return super().append_features(blocks)


async def test_a_failed_job_fails_its_calls_and_no_others() -> None:
    engine = FailingEngine(make_drafter(), DraftChooser(), TORCH, context_positions=4096)
    verifier = ScriptedVerifier()
    verifier.open(A, FEATURES, 10)
    async with running(verifier) as address, worker_of(engine) as worker:
        await attached(worker, address, A)
        await tokens(worker, item(A, 11))
        await asyncio.sleep(0.25)
        engine.failing = True
        verifier.grow(A, 20)
        with pytest.raises(InternalError, match="RuntimeError: out of luck"):  # what had gathered is appended with it
            await worker.propose([item(A, 21)], 1.0)
        assert await tokens(worker, item(A, 21)) == [drafted_alone(A, 20).tokens]
        assert verifier.subscribed == [(A, 0), (A, 10)]
        engine.failing = True
        with pytest.raises(InternalError, match="RuntimeError: out of luck"):
            await worker.propose([item(A, 21)], 1.0)
        assert await tokens(worker, item(A, 21)) == [drafted_alone(A, 20).tokens]


async def test_calls_that_meet_share_a_forward() -> None:
    verifier, metrics = ScriptedVerifier(), DraftMetrics()
    keys = [key_of(str(number)) for number in range(12)]
    for number, key in enumerate(keys):
        verifier.open(key, FEATURES, 10 + number)
    async with running(verifier) as address, worker_of(metrics=metrics) as worker:
        await attached(worker, address, *keys)
        calls = [tokens(worker, item(key, 11 + number)) for number, key in enumerate(keys)]
        answers = await asyncio.gather(*calls)
        assert answers == [[drafted_alone(key, 10 + number).tokens] for number, key in enumerate(keys)]
        batches = metrics.registry.get_sample_value("dspark_draft_seconds_count", {"part": "total"})
        assert batches is not None
        assert batches < 12
