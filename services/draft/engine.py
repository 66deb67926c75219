"""Serves many sequences' drafts (DSpark §3.1). Synchronous; lives in one thread.

Knows which sequences are attached, their contexts, and what a request may ask for. Leaves to others how a drafter
drafts (`drafting.BlockDrafter`), how features get here, who waits for them and every kind of message.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dspark.costs import Refined
from dspark.errors import DSparkError, FeaturesMissing, InvalidRequest, StaleMessage, UnknownSequence
from dspark.kernels import Kernels
from dspark.messages import (
    AttachSequence,
    FeatureBlock,
    Proposal,
    ProposeItem,
    ProposeResult,
    SequenceKey,
    SparseDistribution,
    WorkerLoad,
)
from dspark.models.drafters import Drafter
from dspark.sampling import DraftChooser
from services.draft.architectures import block_drafter
from services.draft.confidence import Confidences
from services.draft.context import ContextRoom
from services.draft.drafting import Block, BlockDrafter, Context, Drafted, Piece
from services.draft.lookup import WithLookup
from services.draft.ngram import NgramBlocks, PromptLookup

__all__ = ["DraftEngine"]

ALIKE = 0.75  # of a batch's blocks, at least, are whole where its time tells what whole blocks take


@dataclass(frozen=True, slots=True)
class _Sequence:
    request: AttachSequence
    context: Context


@dataclass(slots=True)
class _Arrived:
    """What continues one sequence: features and ids of `count` positions from the context's end on."""

    sequence: _Sequence
    count: int = 0
    data: list[memoryview] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """The sequence's once this is appended."""
        return self.sequence.context.length + self.count

    def add(self, block: FeatureBlock, row_bytes: int) -> None:
        """Take what of a block is new."""
        skip = self.length - block.start
        self.count += block.count - skip
        self.data.append(memoryview(block.data)[skip * row_bytes :])
        self.token_ids += block.token_ids[skip:]

    @property
    def piece(self) -> Piece[Any]:
        return Piece(self.sequence.context, self.count, self.token_ids)


class DraftEngine:
    """Attach sequences, append their features, propose blocks: all from one thread, or where said from any."""

    def __init__(
        self,
        drafter: Drafter | PromptLookup,
        chooser: DraftChooser,
        kernels: Kernels,
        *,
        context_positions: int,
        lookup: bool = False,
    ) -> None:
        """`context_positions`: room for the contexts of all sequences together.

        With `lookup`, what repeats is copied, whatever the drafter.
        """
        own = block_drafter(drafter, chooser, kernels, positions=context_positions)
        self._blocks: BlockDrafter[Any] = WithLookup(own) if lookup and not isinstance(own, NgramBlocks) else own
        self._confidences = Confidences(self._blocks.calibration, self._blocks.block_size)
        self._room = ContextRoom(context_positions, self._blocks.block_rows)
        self._sequences: dict[str, _Sequence] = {}
        self._changing = threading.RLock()  # which sequences there are; contexts are of one thread
        self.costs: Refined | None = None
        """What drafting costs by requests: follows what is drafted once it is there."""
        self._last_tokens = 0
        self._last_seconds = 0.0

    # ------------------------------------------------------------ sequences

    def attach(self, request: AttachSequence) -> None:
        """Draft for a sequence from now on; a repeat changes nothing, a newer epoch starts over. Any thread may.

        Raises `StaleMessage` for an older epoch, `OutOfPages` for a max_len without room, `InvalidRequest` for fields
        outside their limits.
        """
        _check_request(request)
        with self._changing:
            present = self._sequences.get(request.key.sequence_id)
            if present is not None:
                if present.request == request:
                    return
                if present.request.key.epoch > request.key.epoch:
                    raise StaleMessage(f"{_describe(request.key)}: epoch {present.request.key.epoch} is attached here")
                self.detach([present.request.key])
            self._sequences[request.key.sequence_id] = _Sequence(request, self._open(request.max_len))

    def _open(self, max_len: int) -> Any:
        limit = self._room.reserve(max_len)
        try:
            return self._blocks.open(limit)
        except BaseException:
            self._room.release(max_len)
            raise

    def detach(self, keys: Iterable[SequenceKey]) -> None:
        """Forget sequences; unknown ones and other epochs are passed over. Any thread may."""
        with self._changing:
            for key in keys:
                sequence = self._sequences.get(key.sequence_id)
                if sequence is not None and sequence.request.key == key:
                    del self._sequences[key.sequence_id]
                    self._room.release(sequence.request.max_len)

    def length(self, key: SequenceKey) -> int | None:
        """Context positions 0 … length - 1 are here; None for a sequence that is not attached. Any thread may ask."""
        sequence = self._sequences.get(key.sequence_id)
        return sequence.context.length if sequence is not None and sequence.request.key == key else None

    def load(self) -> WorkerLoad:
        """What the engine is doing. Any thread may ask."""
        return WorkerLoad(
            running=len(self._sequences),
            tokens_in_flight=self._last_tokens,
            free_pages=self._room.free_pages,
            total_pages=self._room.total_pages,
            step_seconds=self._last_seconds,
            observed_ratio=self.costs.ratio if self.costs is not None else 0.0,
        )

    # ------------------------------------------------------------ features

    def append_features(self, blocks: Sequence[FeatureBlock]) -> list[SequenceKey]:
        """Take features and ids that continue their sequences; what is here already is passed over.

        Returns the attached sequences whose blocks left a gap: features from `length(key)` on have to come again.
        Blocks of sequences or epochs that are not attached, and what goes past a sequence's max_len, are ignored.
        """
        arrived, gaps = self._continuing(blocks)
        if arrived:
            data = bytearray().join(data for own in arrived for data in own.data)
            rows = torch.frombuffer(data, dtype=torch.bfloat16) if data else torch.empty(0, dtype=torch.bfloat16)
            features = rows.view(sum(own.count for own in arrived), self._blocks.feature_size)
            self._blocks.extend([own.piece for own in arrived], features)
        return gaps

    def extend(self, key: SequenceKey, features: Tensor, token_ids: Sequence[int] = ()) -> None:
        """Append features (n, d) of any floating dtype, for chain drafters and prompt lookup with the ids behind them.

        `UnknownSequence` or `StaleMessage` if the sequence is not attached, `InvalidRequest` where ids are missing.
        """
        self._blocks.extend([Piece(self._sequence(key).context, len(features), token_ids)], features)

    def _continuing(self, blocks: Sequence[FeatureBlock]) -> tuple[list[_Arrived], list[SequenceKey]]:
        arrived: dict[SequenceKey, _Arrived] = {}
        gaps: dict[SequenceKey, None] = {}
        for block in blocks:
            sequence = self._sequences.get(block.key.sequence_id)
            if sequence is None or sequence.request.key != block.key:
                continue
            own = arrived.get(block.key) or _Arrived(sequence)
            if block.start > own.length:
                gaps[block.key] = None
            elif own.length < block.start + block.count <= sequence.request.max_len:
                own.add(block, 2 * self._blocks.feature_size)
                arrived[block.key] = own
        return list(arrived.values()), list(gaps)

    # ------------------------------------------------------------ blocks

    def propose(self, items: Sequence[ProposeItem]) -> ProposeResult:
        """One proposal for each item, in order; an item that cannot be served carries its error instead.

        The batch is as long as its longest item wants, each proposal as long as its own.
        """
        result, learn = self.compute(items)
        learn()
        return self._priced(result)

    def compute(self, items: Sequence[ProposeItem]) -> tuple[ProposeResult, Callable[[], None]]:
        """`propose`, but for what is to be learned of it for costs, which whoever waits need not wait for."""
        result = self.answer(items)
        self._last_tokens = sum(len(proposal.tokens) for proposal in result.proposals)
        self._last_seconds = result.total_seconds
        return self._priced(result), partial(self._learn, items, result)

    def answer(self, items: Sequence[ProposeItem]) -> ProposeResult:
        """As `propose`, and nothing remembers it: neither load nor costs."""
        began = time.perf_counter()
        found = [self._ready(item) for item in items]  # once: sequences come and go meanwhile
        pairs = list(zip(items, found, strict=True))
        wanted = [(item, own) for item, own in pairs if isinstance(own, _Sequence) and item.max_tokens > 0]
        drafted = self._draft(wanted) if wanted else None
        forward_seconds = time.perf_counter() - began
        rows = self._rows(drafted, [own for _, own in wanted]) if drafted is not None else iter(())
        proposals = tuple(
            _proposal(item, _NOTHING, own)
            if isinstance(own, DSparkError)
            else _proposal(item, next(rows) if item.max_tokens > 0 else _NOTHING)
            for item, own in pairs
        )
        return ProposeResult(proposals, forward_seconds, time.perf_counter() - began)

    def _learn(self, items: Sequence[ProposeItem], result: ProposeResult) -> None:
        """Let the costs follow drafts of whole blocks, which are what was profiled."""
        if self.costs is None:
            return
        pairs = zip(items, result.proposals, strict=True)
        served = [item for item, proposal in pairs if proposal.error is None and item.max_tokens > 0]
        whole = sum(item.max_tokens >= self._blocks.block_size for item in served)
        if served and whole >= ALIKE * len(served):
            context = sum(item.committed_len for item in served) / len(served)
            self.costs.observe(len(served), context, result.total_seconds)
        self._priced(result)  # what takes its time is done now, and the next reply finds it done

    def _priced(self, result: ProposeResult) -> ProposeResult:
        """With what the costs come to."""
        if self.costs is None:
            return result
        return replace(result, fixed_seconds=self.costs.fixed_seconds, marginal_seconds=self.costs.marginal_seconds)

    def draft(self, items: Sequence[ProposeItem]) -> Drafted:
        """The blocks of items that can be served, as tensors: as many tokens as the longest item wants."""
        return self._draft([(item, self._sequence(item.key)) for item in items])

    def _draft(self, wanted: Sequence[tuple[ProposeItem, _Sequence]]) -> Drafted:
        count = min(max(item.max_tokens for item, _ in wanted), self._blocks.block_size)
        blocks = [
            Block(item.anchor, own.context, own.request.sampling, min(item.max_tokens, count)) for item, own in wanted
        ]
        return self._blocks.draft(blocks, count)

    def _rows(self, drafted: Drafted, sequences: Sequence[_Sequence]) -> Iterator[_Row]:
        """Tokens, confidences and distributions of one block after another, each as long as it came out."""
        tokens, logits = drafted.tokens.tolist(), drafted.confidence_logits
        samplings = [own.request.sampling for own in sequences]
        confidences = (
            [[]] * len(tokens) if logits is None else self._confidences.of(logits, samplings, drafted.settled).tolist()
        )
        lengths = drafted.lengths if drafted.lengths is not None else [len(row) for row in tokens]
        others = tokens if drafted.others is None else drafted.others.tolist()
        distributions = zip(*drafted.distributions, strict=True)
        for length, *row in zip(lengths, tokens, confidences, distributions, others, strict=True):
            yield _Row(*(part[:length] for part in row))

    def _ready(self, item: ProposeItem) -> _Sequence | DSparkError:
        """The item's sequence, or why it cannot be drafted for."""
        try:
            sequence = self._sequence(item.key)
            self._check(item, sequence.context.length)
        except DSparkError as error:
            return error
        return sequence

    def _check(self, item: ProposeItem, length: int) -> None:
        if item.committed_len < 1:
            raise InvalidRequest(f"{_describe(item.key)}: committed_len 0 has no anchor")
        if not 0 <= item.anchor < self._blocks.vocab_size:
            raise InvalidRequest(
                f"{_describe(item.key)}: anchor {item.anchor} is outside the vocabulary, "
                f"0 to {self._blocks.vocab_size - 1}"
            )
        if length > item.committed_len - 1:
            raise StaleMessage(f"{_describe(item.key)}: committed_len {item.committed_len}, {length + 1} here")
        if length < item.committed_len - 1:
            raise FeaturesMissing(
                f"{_describe(item.key)}: features of {length} positions are here, {item.committed_len - 1} are needed"
            )

    def _sequence(self, key: SequenceKey) -> _Sequence:
        sequence = self._sequences.get(key.sequence_id)
        if sequence is None:
            raise UnknownSequence(f"{_describe(key)} is not attached here")
        if sequence.request.key.epoch != key.epoch:
            raise StaleMessage(f"{_describe(key)}: epoch {sequence.request.key.epoch} is attached here")
        return sequence


def _check_request(request: AttachSequence) -> None:
    sampling = request.sampling
    if not request.key.sequence_id:
        raise InvalidRequest("sequence_id is empty")
    if request.max_len < 1:
        raise InvalidRequest(f"max_len {request.max_len}: a sequence has at least one token")
    if not 0.0 <= sampling.temperature < math.inf:
        raise InvalidRequest(f"sampling.temperature {sampling.temperature} is not a finite number of at least 0")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(f"sampling.top_p {sampling.top_p} is outside (0, 1]")
    if not 0.0 <= sampling.min_p < 1.0:
        raise InvalidRequest(f"sampling.min_p {sampling.min_p} is outside [0, 1)")


@dataclass(frozen=True, slots=True)
class _Row:
    """One block; `others` are the tokens where nothing else would have been drafted."""

    tokens: Sequence[int] = ()
    confidences: Sequence[float] = ()
    distributions: Sequence[SparseDistribution | None] = ()
    others: Sequence[int] = ()


_NOTHING = _Row()


def _proposal(item: ProposeItem, row: _Row, error: DSparkError | None = None) -> Proposal:
    return Proposal(
        item.key,
        item.committed_len,
        tuple(row.tokens[: item.max_tokens]),
        tuple(row.confidences[: item.max_tokens]),
        tuple(entry for entry in row.distributions[: item.max_tokens] if entry is not None),
        error,
        alternatives=tuple(row.others[: item.max_tokens]) if row.others != row.tokens else (),
    )


def _describe(key: SequenceKey) -> str:
    return f"sequence {key.sequence_id!r} epoch {key.epoch}"
