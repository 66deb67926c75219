"""Small real workers, without models: a deterministic "target" and a drafter that is right about two times in three.

They keep the protocol strictly (epochs, committed lengths, row limits, pages), so that a router that breaks it shows.
The target's next token depends on the token before it, its position and the seed, as in coupled sampling.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from dspark.costs import CostProfile
from dspark.errors import (
    DSparkError,
    FeaturesMissing,
    InvalidRequest,
    Mismatch,
    OutOfPages,
    StaleMessage,
    Unavailable,
    UnknownSequence,
)
from dspark.messages import (
    Alternative,
    Attached,
    AttachSequence,
    DrafterInfo,
    Mode,
    ModelInfo,
    Opened,
    OpenSequence,
    PositionLogprobs,
    Proposal,
    ProposeItem,
    ProposeResult,
    Sampling,
    SequenceKey,
    SparseDistribution,
    StepItem,
    StepResult,
    TokenLogprob,
    Verdict,
    WorkerLoad,
)
from dspark.rpc import codec
from dspark.rpc.channel import connect
from dspark.rpc.pieces import split
from dspark.rpc.server import Server, serve
from dspark.store import Reading, WorkerRecord
from dspark.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)
from services.router.admission import Admission
from services.router.engine import Engine
from services.router.metrics import Metrics
from services.router.options import Options
from services.router.scheduling.policies import Fixed
from services.router.service import RouterService

BOS, EOS, FIRST_BYTE = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz▁.,!?"
FIRST_LETTER = FIRST_BYTE + 256
VOCAB = FIRST_LETTER + len(LETTERS)

Rule = Callable[[int, int, int], int]
"""(token before, position, seed) -> token."""


def mix(*values: int) -> int:
    """A number that depends on all of its arguments."""
    state = 0x9E3779B9
    for value in values:
        state = ((state ^ (value & 0xFFFFFFFFFFFFFFFF)) * 0x2545F4914F6CDD1D + 0x632BE59B) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state


def letters(previous: int, position: int, seed: int) -> int:
    """The usual target: letters, never the end-of-sequence token."""
    return FIRST_LETTER + mix(previous, position, seed) % len(LETTERS)


def scripted(prompt_tokens: int, token_ids: Iterable[int]) -> Rule:
    """A target that says given tokens after a prompt of that length, then full stops."""
    script = tuple(token_ids)

    def rule(_previous: int, position: int, _seed: int) -> int:
        at = position - prompt_tokens
        return script[at] if at < len(script) else FIRST_LETTER + LETTERS.index(".")

    return rule


def expected(rule: Rule, prompt: Iterable[int], seed: int, count: int) -> list[int]:
    """What the target says, token by token."""
    ids = list(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(rule(ids[-1], len(ids), seed))
    return ids[start:]


def tokenizer_json() -> bytes:
    """Letters, and bytes for everything else."""
    words = ["<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    inner = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<bos>", "<eos>"])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", pair=None, special_tokens=[("<bos>", BOS)])
    return inner.to_str().encode()


def ids_of(text: str) -> list[int]:
    """A text's token ids, without BOS."""
    out: list[int] = []
    for character in text.replace(" ", "▁"):
        if character in LETTERS:
            out.append(FIRST_LETTER + LETTERS.index(character))
        else:
            out += [FIRST_BYTE + byte for byte in character.encode()]
    return out


MODEL = ModelInfo(
    name="toy",
    architecture="toy",
    model_fingerprint="toy-weights",
    numerics_fingerprint="toy-numerics",
    vocab_size=VOCAB,
    hidden_size=1,
    num_layers=1,
    max_context=8192,
    eos_token_ids=(EOS,),
    bos_token_id=BOS,
    has_chat_template=True,
)
DRAFTER = DrafterInfo("toy-drafter", "dspark", "toy-draft", "toy-tap", "toy-weights", VOCAB, VOCAB, 7)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}a "


class Worker(ABC):
    """What both toys share: a server, one engine at a time, and a load."""

    role: Any = "verify"

    def __init__(self, worker_id: str, *, pages: int = 4096) -> None:
        self.worker_id = worker_id
        self.pages = pages
        self.listed = True
        self.draining = False
        self.hang = False
        self.delay = 0.0
        self.costs: CostProfile | None = None
        self.sessions = 0
        self.engine = asyncio.Lock()
        self.server: Server | None = None
        self.listed_at = 0.0

    @property
    def address(self) -> str:
        assert self.server is not None
        return f"127.0.0.1:{self.server.port}"

    @abstractmethod
    def load(self) -> WorkerLoad: ...

    def record(self) -> WorkerRecord:
        profile = self.costs.fingerprint if self.costs is not None else ""
        return WorkerRecord(self.worker_id, self.role, self.address, load=self.load(), profile_fingerprint=profile)

    async def pause(self) -> None:
        """Engine time; a hanging engine never comes back."""
        while self.hang:
            await asyncio.sleep(0.01)
        if self.delay:
            await asyncio.sleep(self.delay)

    async def kill(self) -> None:
        """As when the process dies: every stream breaks at once."""
        assert self.server is not None
        self.listed = False
        await self.server._server.stop(None)


@dataclass
class Open:
    request: OpenSequence
    ids: list[int]
    computed: int
    pages: int
    answered: Verdict | None = None


class ToyVerifier(Worker, verifier_pb2_grpc.VerifierServicer):
    """Serves `dspark.v1.Verifier` over a rule instead of a model."""

    def __init__(
        self,
        worker_id: str = "verify-0",
        *,
        rule: Rule = letters,
        model: ModelInfo = MODEL,
        pages: int = 4096,
        page_size: int = 16,
        max_step_tokens: int = 512,
        row_seconds: float = 0.0,
    ) -> None:
        super().__init__(worker_id, pages=pages)
        self.rule = rule
        self.model = model
        self.page_size = page_size
        self.max_step_tokens = max_step_tokens
        self.row_seconds = row_seconds
        self.open: dict[str, Open] = {}
        self.steps: list[list[StepItem]] = []
        self.closed_at: dict[str, float] = {}
        self.opened: list[OpenSequence] = []
        self.refuse_next_open: DSparkError | None = None
        self.item_fault: Callable[[StepItem], DSparkError | None] = lambda _item: None
        self.on_commit: Callable[[SequenceKey, int, int], None] = lambda _key, _committed_len, _anchor: None

    @property
    def free(self) -> int:
        return self.pages - sum(entry.pages for entry in self.open.values())

    def load(self) -> WorkerLoad:
        return WorkerLoad(running=len(self.open), free_pages=self.free, total_pages=self.pages, draining=self.draining)

    async def Describe(self, request: Any, context: Any) -> verifier_pb2.DescribeVerifierResponse:
        return verifier_pb2.DescribeVerifierResponse(
            worker_id=self.worker_id,
            model=codec.encode(self.model),
            page_size=self.page_size,
            max_step_tokens=self.max_step_tokens,
            load=codec.encode(self.load()),
        )

    async def FetchTokenizer(self, request: Any, context: Any) -> AsyncIterator[types_pb2.Piece]:
        facts = {"bos_token_id": BOS, "eos_token_ids": [EOS], "chat_template": TEMPLATE}
        for name, data in (("tokenizer.json", tokenizer_json()), ("model.json", json.dumps(facts).encode())):
            for piece in split(name, data):
                yield piece

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        mine: set[str] = set()
        self.sessions += 1
        try:
            async for request in requests:
                async with self.engine:
                    await self.pause()
                    result = await self.answer(request, mine)
                yield codec.verifier_reply(request.call_id, result, self.load())
        finally:
            self.sessions -= 1
            for sequence_id in mine:
                self.open.pop(sequence_id, None)

    async def answer(self, request: Any, mine: set[str]) -> Any:
        kind = request.WhichOneof("call")
        if kind == "open":
            return [self._open(message, mine) for message in codec.decode(request.open)]
        if kind == "step":
            return await self._step(codec.decode(request.step))
        for key in map(codec.key_of, request.close.sequences):
            self._close(key, mine)
        return None

    def _open(self, message: OpenSequence, mine: set[str]) -> Opened:
        self.opened.append(message)
        if self.refuse_next_open is not None:
            error, self.refuse_next_open = self.refuse_next_open, None
            return Opened(message.key, error=error)
        if self.draining:
            return Opened(message.key, error=Unavailable("draining"))
        pages = -(-message.max_len // self.page_size)
        if pages > self.free:
            return Opened(message.key, error=OutOfPages(f"{pages} pages wanted, {self.free} free"))
        self.open[message.key.sequence_id] = Open(message, list(message.token_ids), 0, pages)
        mine.add(message.key.sequence_id)
        return Opened(message.key)

    def _close(self, key: SequenceKey, mine: set[str]) -> None:
        entry = self.open.get(key.sequence_id)
        if entry is not None and entry.request.key == key:
            del self.open[key.sequence_id]
            mine.discard(key.sequence_id)
            self.closed_at[entry.request.request_id] = time.monotonic()

    async def _step(self, items: tuple[StepItem, ...]) -> StepResult | DSparkError:
        rows = sum(item.rows for item in items)
        if rows > self.max_step_tokens or len({item.key for item in items}) != len(items):
            return InvalidRequest(f"{rows} rows, the limit is {self.max_step_tokens}")
        self.steps.append(list(items))
        began = time.perf_counter()
        if self.row_seconds:
            await asyncio.sleep(rows * self.row_seconds)
        verdicts = tuple(self._verdict(item) for item in items)
        return StepResult(verdicts, total_seconds=time.perf_counter() - began)

    def _verdict(self, item: StepItem) -> Verdict:
        try:
            return self._verify(item)
        except DSparkError as error:
            return Verdict(item.key, item.committed_len, error=error)

    def _verify(self, item: StepItem) -> Verdict:
        if (fault := self.item_fault(item)) is not None:
            raise fault
        entry = self.open.get(item.key.sequence_id)
        if entry is None:
            raise UnknownSequence(item.key.sequence_id)
        if (entry.request.key, len(entry.ids)) != (item.key, item.committed_len):
            raise StaleMessage(f"{item.key} at {item.committed_len}, here {entry.request.key} at {len(entry.ids)}")
        missing = len(entry.ids) - entry.computed
        if not 1 <= item.count <= missing or (item.draft_tokens and item.count != missing):
            raise InvalidRequest(f"count {item.count} of {missing}, {len(item.draft_tokens)} drafts")
        if len(entry.ids) + len(item.draft_tokens) >= entry.request.max_len:
            raise InvalidRequest("past max_len")
        entry.computed += item.count
        if item.count < missing:
            return Verdict(item.key, item.committed_len, entry.computed)
        return self._extend(entry, item)

    def _extend(self, entry: Open, item: StepItem) -> Verdict:
        sampling = entry.request.sampling
        if sampling.mode is Mode.REJECTION and len(item.draft_distributions) != len(item.draft_tokens):
            raise InvalidRequest("rejection mode needs distributions")
        if item.alternatives and (sampling.mode is Mode.REJECTION or item.keep is not None):
            raise InvalidRequest("alternatives are for coupled mode alone")
        if any(one.place > len(item.draft_tokens) for one in item.alternatives):
            raise InvalidRequest(f"{item.alternatives} to {len(item.draft_tokens)} drafts")
        new: list[int] = []
        for draft in (*item.draft_tokens, None):
            new.append(self.rule((entry.ids + new)[-1], len(entry.ids) + len(new), sampling.seed))
            if new[-1] != draft:
                break
        matched = len(new) - 1
        del new[(matched if item.keep is None else item.keep) + 1 :]
        accepted = len(new) - 1
        if turned := Alternative(accepted + 1, new[-1]) in item.alternatives:
            new.append(self.rule(new[-1], len(entry.ids) + len(new), sampling.seed))
        entry.ids += new
        entry.computed = len(entry.ids) - 1
        logprobs = self._logprobs(new, sampling)
        self.on_commit(item.key, len(entry.ids), new[-1])
        told = item.key, item.committed_len, entry.computed, accepted, new[-1], logprobs
        return Verdict(*told, matched=matched, turned=turned, alternatives=len(item.alternatives))

    def _logprobs(self, tokens: list[int], sampling: Sampling) -> tuple[PositionLogprobs, ...]:
        if sampling.logprobs is None:
            return ()
        top = tuple(TokenLogprob(token, -2.0) for token in range(sampling.logprobs))
        return tuple(PositionLogprobs(TokenLogprob(token, -0.5), top) for token in tokens)


class ToyDraft(Worker, draft_pb2_grpc.DraftServicer):
    """Serves `dspark.v1.Draft`: the rule's tokens, spoilt at every third position or so."""

    role = "draft"

    def __init__(
        self,
        worker_id: str = "draft-0",
        *,
        rule: Rule = letters,
        drafter: DrafterInfo = DRAFTER,
        spoil: Callable[[int], bool] = lambda position: mix(position, 7) % 3 == 0,
        second: Callable[[int], bool] | None = None,
    ) -> None:
        """`second`: where the token beside a spoilt one is right; None: nothing is named beside any."""
        super().__init__(worker_id)
        self.rule = rule
        self.drafter = drafter
        self.spoil, self.second = spoil, second
        self.attached: dict[str, AttachSequence] = {}
        self.proposals = 0
        self.wanted: list[int] = []
        self.refusals = 0
        self.detached_at: dict[str, float] = {}
        self.features_missing = False
        self.mismatch = False
        self.stays = False
        self.silent = False
        self.staying: dict[SequenceKey, tuple[int, asyncio.Queue[Any]]] = {}
        self.latest: dict[SequenceKey, tuple[int, int]] = {}
        self.unasked = 0
        self.alter: Callable[[Proposal], Proposal] = lambda proposal: proposal

    def load(self) -> WorkerLoad:
        return WorkerLoad(running=len(self.attached), draining=self.draining)

    async def Describe(self, request: Any, context: Any) -> draft_pb2.DescribeDraftResponse:
        return draft_pb2.DescribeDraftResponse(
            worker_id=self.worker_id, drafter=codec.encode(self.drafter), load=codec.encode(self.load())
        )

    async def Session(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        mine: set[str] = set()
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        self.sessions += 1
        reader = asyncio.create_task(self._read(requests, mine, outbox))
        try:
            while (reply := await outbox.get()) is not None:
                yield reply
        finally:
            reader.cancel()
            self.sessions -= 1
            for sequence_id in mine:
                self.attached.pop(sequence_id, None)

    async def _read(self, requests: AsyncIterator[Any], mine: set[str], outbox: asyncio.Queue[Any]) -> None:
        try:
            async for request in requests:
                async with self.engine:
                    await self.pause()
                    result = self.answer(request, mine, outbox)
                outbox.put_nowait(codec.draft_reply(request.call_id, result, self.load()))
        finally:
            outbox.put_nowait(None)

    def committed(self, key: SequenceKey, committed_len: int, anchor: int) -> None:
        """As when features come: a block for who is stayed with."""
        self.latest[key] = committed_len, anchor
        order = self.staying.get(key)
        if order is None or self.silent:
            return
        self.unasked += 1
        proposal = self._propose(ProposeItem(key, committed_len, anchor, order[0], stay=True), order[1])
        order[1].put_nowait(codec.draft_reply(0, ProposeResult((proposal,), total_seconds=1e-4), self.load()))

    def answer(self, request: Any, mine: set[str], outbox: asyncio.Queue[Any]) -> Any:
        kind = request.WhichOneof("call")
        if kind == "attach":
            return [self._attach(message, mine) for message in codec.decode(request.attach)]
        if kind == "propose":
            proposals = tuple(self._propose(item, outbox) for item in codec.decode(request.propose))
            return ProposeResult(proposals, total_seconds=self.delay or 1e-4)
        for key in map(codec.key_of, request.detach.sequences):
            self._detach(key, mine)
        return None

    def _attach(self, message: AttachSequence, mine: set[str]) -> Attached:
        if self.mismatch:
            return Attached(message.key, Mismatch("another target's drafter"))
        assert message.verifier_address
        self.attached[message.key.sequence_id] = message
        mine.add(message.key.sequence_id)
        return Attached(message.key)

    def _detach(self, key: SequenceKey, mine: set[str]) -> None:
        message = self.attached.get(key.sequence_id)
        if message is not None and message.key == key:
            del self.attached[key.sequence_id]
            self.staying.pop(key, None)
            mine.discard(key.sequence_id)
            self.detached_at[message.request_id] = time.monotonic()

    def _order(self, item: ProposeItem, outbox: asyncio.Queue[Any]) -> Proposal:
        """Nothing now; what is behind the text by now at once."""
        stays = item.stay and self.stays
        if not stays:
            self.staying.pop(item.key, None)
            return Proposal(item.key, item.committed_len)
        self.staying[item.key] = (item.max_tokens, outbox)
        committed_len, anchor = self.latest.get(item.key, (0, 0))
        if committed_len > item.committed_len:
            self.committed(item.key, committed_len, anchor)
        return Proposal(item.key, item.committed_len, stays=True)

    def _propose(self, item: ProposeItem, outbox: asyncio.Queue[Any]) -> Proposal:
        if item.later:
            return self._order(item, outbox)
        self.staying.pop(item.key, None)
        message = self.attached.get(item.key.sequence_id)
        if message is None or message.key != item.key:
            return Proposal(item.key, item.committed_len, error=UnknownSequence(item.key.sequence_id))
        if self.features_missing:
            self.refusals += 1
            return Proposal(item.key, item.committed_len, error=FeaturesMissing("not yet"))
        tokens: list[int] = []
        others: list[int] = []
        for position in range(item.committed_len, item.committed_len + min(item.max_tokens, self.drafter.block_size)):
            token = self.rule(tokens[-1] if tokens else item.anchor, position, message.sampling.seed)
            tokens.append((token + 1) % VOCAB if self.spoil(position) else token)
            if self.second is not None and message.sampling.mode is not Mode.REJECTION:
                others.append(token if self.spoil(position) and self.second(position) else (token + 2) % VOCAB)
        stays = item.stay and self.stays
        if stays:
            self.staying[item.key] = (item.max_tokens, outbox)
        self.proposals += 1
        self.wanted.append(item.max_tokens)
        return self.alter(
            Proposal(
                item.key,
                item.committed_len,
                tuple(tokens),
                (0.5,) * len(tokens),
                tuple(SparseDistribution((token,), (1.0,)) for token in tokens)
                if message.sampling.mode is Mode.REJECTION
                else (),
                stays=stays,
                alternatives=tuple(others),
            )
        )


class Board:
    """Stands for the store's directory: shows the workers that are up."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.emptied = False
        self.age = 0.0

    def profile(self, fingerprint: str) -> CostProfile | None:
        return next((w.costs for w in self.workers if w.costs and w.costs.fingerprint == fingerprint), None)

    def readings(self) -> tuple[Reading, ...]:
        if self.emptied:
            return ()
        return tuple(Reading(w.record(), time.monotonic()) for w in self.workers if w.listed and w.server is not None)


@dataclass
class Result:
    """What a client got."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    started: Any = None
    finished: Any = None


class Cluster:
    """Toy workers and real routers in one loop."""

    def __init__(self, stack: AsyncExitStack, options: Options, front: dict[str, Any]) -> None:
        self.stack = stack
        self.board = Board()
        self.options = options
        self.front = front
        self.engines: list[Engine] = []
        self.addresses: list[str] = []
        self.services: list[RouterService] = []
        self.channels: list[grpc.aio.Channel] = []

    async def add(self, worker: Any) -> None:
        """Starts a worker and lists it."""
        if worker.role == "verify":
            registration = (verifier_pb2_grpc.add_VerifierServicer_to_server, worker, "dspark.v1.Verifier")
        else:
            registration = (draft_pb2_grpc.add_DraftServicer_to_server, worker, "dspark.v1.Draft")
        worker.server = await self.stack.enter_async_context(serve("127.0.0.1:0", [registration], grace=0.0))
        self.board.workers.append(worker)

    async def add_router(self) -> None:
        """Starts a router and connects a client to it."""
        engine = await self.stack.enter_async_context(Engine(self.board, self.options, Metrics()))
        admission = Admission(max_queue=self.front.get("max_queue", 64), rate=self.front.get("rate", 0))
        buffer = self.front.get("stream_buffer", 4096)
        service = RouterService(engine, admission, max_message_bytes=4 << 20, stream_buffer=buffer)
        registration = (generation_pb2_grpc.add_RouterServicer_to_server, service, "dspark.v1.Router")
        server = await self.stack.enter_async_context(serve("127.0.0.1:0", [registration], grace=0.0))
        channel = await self.stack.enter_async_context(connect(f"127.0.0.1:{server.port}"))
        self.addresses.append(f"127.0.0.1:{server.port}")
        self.engines.append(engine)
        self.services.append(service)
        self.channels.append(channel)

    @property
    def engine(self) -> Engine:
        return self.engines[0]

    def stub(self, router: int = 0) -> Any:
        return generation_pb2_grpc.RouterStub(self.channels[router])

    async def generate(
        self,
        prompt: Iterable[int] | str = "hello",
        *,
        router: int = 0,
        deadline: float | None = 60,
        on_delta: Callable[[Result], Any] | None = None,
        sampling: dict[str, Any] | None = None,
        metadata: Any = None,
        **fields: Any,
    ) -> Result:
        """One completed request."""
        request = request_of(prompt, sampling, **fields)
        result = Result()
        call = self.stub(router).Generate(request, timeout=deadline, metadata=metadata)
        async for response in call:
            kind = response.WhichOneof("event")
            if kind == "delta":
                result.ids += response.delta.token_ids
                result.text += response.delta.text
                result.texts.append(response.delta.text)
                result.logprobs += response.delta.logprobs
                result.times.append(time.monotonic())
                if on_delta is not None:
                    on_delta(result)
            else:
                setattr(result, kind, getattr(response, kind))
        return result


def request_of(
    prompt: Iterable[int] | str, sampling: dict[str, Any] | None = None, **fields: Any
) -> generation_pb2.GenerateRequest:
    """A request with a fixed seed."""
    settings = generation_pb2.SamplingParams(**({"seed": 5} | (sampling or {})))
    if isinstance(prompt, str):
        return generation_pb2.GenerateRequest(text=prompt, sampling=settings, **fields)
    ids = generation_pb2.TokenIds(ids=prompt)
    return generation_pb2.GenerateRequest(token_ids=ids, sampling=settings, **fields)


def by_fives(**changes: Any) -> Options:
    """Options of a router that verifies five drafts a round: toys have no costs to go by."""
    return Options(**({"policy": Fixed(5)} | changes))


@asynccontextmanager
async def cluster(
    *workers: Any, routers: int = 1, options: Options | None = None, **front: Any
) -> AsyncIterator[Cluster]:
    """Workers, and routers that know them all; by default one of each."""
    async with AsyncExitStack() as stack:
        made = Cluster(stack, options or by_fives(), front)
        for worker in workers or (ToyVerifier(), ToyDraft()):
            await made.add(worker)
        for _ in range(routers):
            await made.add_router()
        listed = len([w for w in made.board.workers if w.listed])
        await until(lambda: all(len(e.verifiers.links) + len(e.drafters.links) == listed for e in made.engines))
        yield made


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Returns when the condition holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def quietly(call: Any) -> None:
    """Reads a call to its end, whatever that is."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        async for _ in call:
            pass
