"""A draft worker and a verify worker, both real: what arrives is what drafting needs, by wire and in one process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drafting import GREEDY, attach, item, key_of, make_any, make_drafter
from support.drafting import make_engine as make_draft_engine
from support.verifying import make_engine as make_verify_engine

from dspark.errors import Mismatch, Unavailable
from dspark.kernels import select_kernels
from dspark.messages import (
    AttachSequence,
    OpenSequence,
    Proposal,
    SequenceKey,
    StepItem,
    StepResult,
    Verdict,
)
from dspark.models.batch import RaggedBatch
from dspark.models.drafters import Drafter
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel, load_target
from dspark.rpc.channel import connect
from dspark.rpc.codec import decode, open_call, step_call
from dspark.rpc.server import serve
from dspark.rpc.session import Session
from dspark.v1 import verifier_pb2 as pb
from dspark.v1.verifier_pb2_grpc import VerifierStub, add_VerifierServicer_to_server
from services.draft.metrics import DraftMetrics
from services.draft.ngram import NgramContext, PromptLookup
from services.draft.offer import TapOffer
from services.draft.worker import DraftWorker
from services.pair.near import Links
from services.pair.turns import Turns
from services.verifier.engine import VerifyEngine
from services.verifier.service import VerifierService
from services.verifier.thread import EngineThread

WorkerOf = Callable[[Drafter | PromptLookup, "Verifier"], AbstractAsyncContextManager[DraftWorker]]
RouterSession = Session[pb.VerifierRequest, pb.VerifierReply]
PROMPT = [2, *range(40, 101), 9, 9, 17, 300, 41]
CPU = torch.device("cpu")


@dataclass
class Verifier:
    engine: VerifyEngine
    address: str
    thread: EngineThread


@asynccontextmanager
async def verifier_of(path: Path, address: str = "127.0.0.1:0") -> AsyncIterator[Verifier]:
    engine = make_verify_engine(path, pages=128)
    with EngineThread(engine) as thread:
        service = VerifierService(thread, worker_id="v", page_size=16, files={})
        servicer = (add_VerifierServicer_to_server, service, "dspark.v1.Verifier")
        async with serve(address, [servicer], grace=0.1) as server:
            yield Verifier(engine, f"127.0.0.1:{server.port}", thread)


@asynccontextmanager
async def worker_of(drafter: Drafter | PromptLookup) -> AsyncIterator[DraftWorker]:
    offer = TapOffer.of(drafter, Path("tiny"))
    async with DraftWorker(make_draft_engine(drafter), offer, metrics=DraftMetrics()) as worker:
        yield worker


@asynccontextmanager
async def near_worker_of(drafter: Drafter | PromptLookup, verifier: Verifier) -> AsyncIterator[DraftWorker]:
    """In the verify worker's own thread."""
    offer, links = TapOffer.of(drafter, Path("tiny")), Links(verifier.thread, 1 << 20)
    links.address = verifier.address
    engine, turns = make_draft_engine(drafter), Turns(verifier.thread)
    async with DraftWorker(
        engine, offer, metrics=DraftMetrics(), executor=turns, connect=links.connect, connect_seconds=2.0
    ) as worker:
        yield worker


WORKERS: dict[str, WorkerOf] = {"apart": lambda drafter, _verifier: worker_of(drafter), "near": near_worker_of}


@pytest.fixture(params=WORKERS)
def any_worker_of(request: pytest.FixtureRequest) -> WorkerOf:
    """A draft worker for a verify worker, in whatever place."""
    return WORKERS[request.param]


@asynccontextmanager
async def session_of(verifier: Verifier) -> AsyncIterator[RouterSession]:
    async with connect(verifier.address) as channel, RouterSession(VerifierStub(channel).Session) as session:
        yield session


class Router:
    """A router's part for one sequence."""

    def __init__(self, session: RouterSession, worker: DraftWorker, key: SequenceKey, ids: Sequence[int]) -> None:
        self.session, self.worker, self.key, self.ids = session, worker, key, list(ids)
        self.cached = self.computed = 0

    async def open(self) -> None:
        request = OpenSequence(self.key, tuple(self.ids), GREEDY, 200)
        reply = await self.session.call(open_call([request]), timeout=10)
        (opened,) = decode(reply.opened)
        assert opened.error is None
        self.cached = self.computed = opened.computed_len

    async def attach(self, address: str) -> None:
        (answer,) = await self.worker.attach([AttachSequence(self.key, address, GREEDY, 200)])
        assert answer.error is None

    async def step(self, drafts: Sequence[int] = (), count: int | None = None) -> Verdict:
        missing = len(self.ids) - self.computed
        asked = StepItem(self.key, len(self.ids), count or missing, tuple(drafts))
        reply = await self.session.call(step_call([asked]), timeout=10)
        result: StepResult = decode(reply.step)
        (verdict,) = result.verdicts
        assert verdict.error is None
        self.computed = verdict.computed_len
        if verdict.token is not None:
            self.ids += [*drafts[: verdict.accepted], verdict.token]
        return verdict

    async def propose(self, wait: float = 10.0) -> Proposal:
        asked = item(self.key, len(self.ids), anchor=self.ids[-1])
        (proposal,) = (await self.worker.propose([asked], wait)).proposals
        assert proposal.error is None, proposal.error
        return proposal


def expected(target: TargetModel, drafter: Drafter, ids: Sequence[int]) -> Proposal:
    """The block behind these committed ids, everything computed afresh and in one piece."""
    context, layers = ids[:-1], drafter.config.target_layer_ids
    cache = KVCache(target.config, pages=32, dtype=target.kept_dtype, device=CPU, max_step_rows=256)
    batch = RaggedBatch.build([(cache.open(context, 200), context, 0)])
    captured = target.forward(batch, cache, capture=frozenset(layers)).captured
    features = drafter.features(torch.stack([captured[layer] for layer in layers], 1)).bfloat16()
    engine = make_draft_engine(drafter)
    attach(engine, key_of())
    engine.extend(key_of(), features, ids[1:])
    return engine.propose([item(key_of(), len(ids), anchor=ids[-1])]).proposals[0]


@pytest.fixture(scope="module")
def target(tiny_gemma: Path) -> TargetModel:
    return load_target(tiny_gemma, dtype=torch.float32, device=CPU, kernels=select_kernels("auto", CPU))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("dspark", {}),
        ("dspark", {"normalize_inputs": True, "fc_bias": True}),
        ("dflash", {}),
        ("eagle3", {"num_layers": 1, "rope_thetas": (1e4,)}),
        ("mtp", {}),
    ],
)
async def test_each_rounds_block_is_that_of_a_fresh_start(
    tiny_gemma: Path, target: TargetModel, architecture: str, changes: dict[str, Any], any_worker_of: WorkerOf
) -> None:
    """Prompt pieces, accepted and rejected drafts: no position or id may be missing, doubled or shifted."""
    drafter = make_any(architecture, **changes)
    async with (
        verifier_of(tiny_gemma) as verifier,
        any_worker_of(drafter, verifier) as worker,
        session_of(verifier) as session,
    ):
        router = Router(session, worker, key_of(), PROMPT)
        await router.open()
        await router.attach(verifier.address)
        await router.step(count=30)
        await router.step()
        greedy = await continuation(tiny_gemma, len(PROMPT) + 24)
        accepted = []
        for round_ in range(8):
            proposal = await router.propose()
            fresh = expected(target, drafter, router.ids)
            assert proposal.tokens == fresh.tokens
            assert proposal.confidences == pytest.approx(fresh.confidences, abs=1e-3)
            right = greedy[len(router.ids) :][: round_ % 4]  # as many drafts that will stand
            verdict = await router.step([*right, *proposal.tokens[: 2 + round_ % 3]])
            accepted.append(verdict.accepted)
        assert min(accepted) == 0
        assert max(accepted) >= 3


async def continuation(path: Path, length: int) -> list[int]:
    """The target's greedy tokens behind the prompt, prompt included."""
    async with verifier_of(path) as verifier, worker_of(make_drafter()) as worker, session_of(verifier) as session:
        router = Router(session, worker, key_of(), PROMPT)
        await router.open()
        while len(router.ids) < length + 8:
            await router.step()
        return router.ids


async def test_prompt_lookup_sees_the_text_and_nothing_else(tiny_gemma: Path, any_worker_of: WorkerOf) -> None:
    """Through repeated prompts, rejected and accepted drafts: what is drafted is what the text says."""
    lookup = PromptLookup(vocab_size=512)
    async with (
        verifier_of(tiny_gemma) as verifier,
        any_worker_of(lookup, verifier) as worker,
        session_of(verifier) as session,
    ):
        for name in ("first", "cached"):
            router = Router(session, worker, key_of(name), [*PROMPT, *PROMPT[:40]])
            await router.open()
            await router.attach(verifier.address)
            await router.step(count=3)
            await router.step()
            drafted = 0
            for round_ in range(8):
                proposal = await router.propose()
                text = NgramContext(lookup.lengths)
                text.append(router.ids[1:])
                assert proposal.tokens == tuple(text.lookup(5).tokens)
                drafted += len(proposal.tokens)
                await router.step([*proposal.tokens, 5][: 1 + round_])
            assert drafted > 0
        assert verifier.engine.tap_ids == ()


async def test_a_prefix_from_the_cache_brings_its_features(tiny_gemma: Path, target: TargetModel) -> None:
    drafter = make_drafter()
    async with verifier_of(tiny_gemma) as verifier, worker_of(drafter) as worker, session_of(verifier) as session:
        for name, cached in (("first", 0), ("second", 48)):
            router = Router(session, worker, key_of(name), PROMPT)
            await router.open()
            assert router.cached >= cached
            await router.attach(verifier.address)
            await router.step()
            assert (await router.propose()).tokens == expected(target, drafter, router.ids).tokens


async def test_a_second_draft_worker_takes_over_in_the_middle(tiny_gemma: Path, target: TargetModel) -> None:
    drafter = make_drafter()
    async with verifier_of(tiny_gemma) as verifier, session_of(verifier) as session:
        async with worker_of(drafter) as first:
            router = Router(session, first, key_of(), PROMPT)
            await router.open()
            await router.attach(verifier.address)
            await router.step()
            for _ in range(3):
                await router.step((await router.propose()).tokens)
        await router.step()
        async with worker_of(make_drafter()) as router.worker:
            await router.attach(verifier.address)
            assert (await router.propose()).tokens == expected(target, drafter, router.ids).tokens


async def test_a_restarted_verifier_gets_the_tap_and_sends_all_again(tiny_gemma: Path, target: TargetModel) -> None:
    drafter = make_drafter()
    async with worker_of(drafter) as worker:
        async with verifier_of(tiny_gemma) as verifier, session_of(verifier) as session:
            router = Router(session, worker, key_of("a", 0), PROMPT)
            await router.open()
            await router.attach(verifier.address)
            await router.step()
            await router.step((await router.propose()).tokens)
            await router.propose()
        async with verifier_of(tiny_gemma, verifier.address) as again, connect(again.address) as channel:
            assert not again.engine.tap_ids
            async with RouterSession(VerifierStub(channel).Session) as session:
                moved = Router(session, worker, key_of("a", 1), router.ids)
                await moved.open()
                await moved.attach(again.address)
                assert drafter.tap.tap_id in again.engine.tap_ids
                await moved.step()
                assert (await moved.propose()).tokens == expected(target, drafter, moved.ids).tokens


async def test_a_near_worker_is_refused_by_a_target_that_it_does_not_fit(tiny_gemma: Path) -> None:
    lookup = PromptLookup(vocab_size=511)
    async with verifier_of(tiny_gemma) as verifier, near_worker_of(lookup, verifier) as worker:
        (answer,) = await worker.attach([AttachSequence(key_of(), verifier.address, GREEDY, 200)])
        assert isinstance(answer.error, Mismatch)
        assert worker.load().running == 0


async def test_a_near_worker_registers_a_tap_again_that_was_forgotten(tiny_gemma: Path, target: TargetModel) -> None:
    drafter = make_drafter()
    async with (
        verifier_of(tiny_gemma) as verifier,
        near_worker_of(drafter, verifier) as worker,
        session_of(verifier) as session,
    ):
        router = Router(session, worker, key_of(), PROMPT)
        await router.open()
        await router.attach(verifier.address)
        await router.step()
        await router.propose()
        worker.detach([router.key])
        await verifier.thread.call(verifier.engine._features._buffers.clear)
        other = Router(session, worker, key_of("other"), PROMPT[:20])
        await other.open()
        await other.attach(verifier.address)
        await other.step()
        assert (await other.propose()).tokens == expected(target, drafter, other.ids).tokens


async def test_a_near_worker_follows_other_verify_workers_by_wire(tiny_gemma: Path, target: TargetModel) -> None:
    drafter = make_drafter()
    async with (
        verifier_of(tiny_gemma) as own,
        verifier_of(tiny_gemma) as far,
        near_worker_of(drafter, own) as worker,
        session_of(far) as session,
    ):
        router = Router(session, worker, key_of(), PROMPT)
        await router.open()
        await router.attach(far.address)
        await router.step()
        assert (await router.propose()).tokens == expected(target, drafter, router.ids).tokens
        assert not own.engine.tap_ids


async def test_what_takes_turns_is_refused_once_the_engine_has_ended(tiny_gemma: Path) -> None:
    with EngineThread(make_verify_engine(tiny_gemma, pages=16)) as thread:
        turns = Turns(thread)
        order: list[int] = []
        calls = [turns.submit(order.append, number) for number in range(5)]
        turns.shutdown()
        assert order == list(range(5))
        assert all(call.done() for call in calls)
        assert turns.submit(sum, [1, 2]).result(5) == 3  # the thread goes on
    with pytest.raises(Unavailable):
        turns.submit(sum, [1, 2]).result(5)
    turns.shutdown()


async def test_many_sequences_at_once(tiny_gemma: Path, target: TargetModel, any_worker_of: WorkerOf) -> None:
    drafter = make_drafter()
    async with (
        verifier_of(tiny_gemma) as verifier,
        any_worker_of(drafter, verifier) as worker,
        session_of(verifier) as session,
    ):
        routers = [Router(session, worker, key_of(str(n)), PROMPT[: 5 + 7 * n]) for n in range(6)]

        async def run(router: Router) -> None:
            await router.open()
            await router.attach(verifier.address)
            await router.step()
            for _ in range(3):
                await router.step((await router.propose()).tokens)
            assert (await router.propose()).tokens == expected(target, drafter, router.ids).tokens

        await asyncio.gather(*map(run, routers))
