"""Where a round's time goes on this machine: drafting a block, the sequential head in it, a verify step (DSpark §4).

Each time is the least of a few repeats, which other work on the machine disturbs least; contexts have one length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspark.devices import drafting
from dspark.kernels import Kernels
from dspark.messages import AttachSequence, OpenSequence, ProposeItem, Sampling, SequenceKey, StepItem
from dspark.models.drafters import Drafter, DSparkDrafter
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.verifier.engine import VerifyEngine
from training.proposers import AnyDrafter, block_size_of

__all__ = ["RoundTime", "time_round"]

_SAMPLING = Sampling(temperature=1.0, seed=1)


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Seconds of one round of some streams.

    `draft`: whole blocks, of which `head` in the sequential head (0 without one); `verify`: a verify step over anchors
    and whole blocks.
    """

    drafter: str
    streams: int
    context: int
    draft: float
    head: float
    verify: float

    @property
    def head_of_draft(self) -> float:
        """The sequential head's share of drafting."""
        return self.head / self.draft

    @property
    def head_of_round(self) -> float:
        """The sequential head's share of drafting and verifying together."""
        return self.head / (self.draft + self.verify)


def time_round(
    name: str, drafter: AnyDrafter, target: TargetModel, *, streams: int = 1, context: int = 128, repeats: int = 15
) -> RoundTime:
    """Time a round of `streams` sequences with `context` tokens each."""
    block = block_size_of(drafter)
    keys = [SequenceKey(str(number), 0) for number in range(streams)]
    kernels = drafting(target.kernels)
    return RoundTime(
        drafter=name,
        streams=streams,
        context=context,
        draft=_least(_drafting(drafter, kernels, keys, context), target.device, repeats),
        head=_least(_head(drafter, kernels, streams), target.device, repeats)
        if isinstance(drafter, DSparkDrafter)
        else 0.0,
        verify=_least(_verifying(target, keys, context, block, repeats + 2), target.device, repeats),
    )


def _least(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    work()
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _drafting(drafter: AnyDrafter, kernels: Kernels, keys: Sequence[SequenceKey], context: int) -> Callable[[], object]:
    width = drafter.config.hidden_size if isinstance(drafter, Drafter) else 0
    engine = DraftEngine(drafter, DraftChooser(), kernels, context_positions=len(keys) * (context + 512))
    ids = _ids(context)
    for key in keys:
        engine.attach(AttachSequence(key, "", _SAMPLING, context + 256))
        engine.extend(key, torch.randn(context - 1, width), ids[1:context])
    items = [ProposeItem(key, context, ids[context - 1], block_size_of(drafter)) for key in keys]
    return lambda: engine.propose(items)


def _head(drafter: DSparkDrafter, kernels: Kernels, streams: int) -> Callable[[], object]:
    """What the sequential head adds to a block whose logits are there: z_k, B_k = W_2 z_k and its addition."""
    config, head, like = drafter.config, drafter.head, drafter.norm.weight
    bias = kernels.linear(head.markov_w2.weight)
    hidden = torch.randn(streams, config.hidden_size).to(like)
    logits = torch.randn(streams, config.draft_vocab_size).to(like)
    tokens = torch.full((streams,), 3, device=like.device)

    @torch.inference_mode()
    def work() -> None:
        state = head.initial_state(streams)
        for _ in range(config.block_size):
            latent, state = head.latent(state, head.previous(tokens), hidden)
            logits + bias(latent)

    return work


def _verifying(
    target: TargetModel, keys: Sequence[SequenceKey], context: int, block: int, steps: int
) -> Callable[[], object]:
    limit = context + (steps + 1) * (block + 1)
    cache = KVCache(target.config, pages=len(keys) * (limit // 16 + 3), dtype=target.kept_dtype, device=target.device)
    engine = VerifyEngine(target, cache)
    ids = _ids(context + block)
    for key in keys:
        (opened,) = engine.open([OpenSequence(key, tuple(ids[:context]), _SAMPLING, limit, features=False)])
        if opened.error is not None:
            raise opened.error
    lengths = dict.fromkeys(keys, context)
    uncomputed = dict.fromkeys(keys, context)

    def work() -> None:
        drafts = tuple(ids[context : context + block])
        items = [StepItem(key, lengths[key], uncomputed[key], drafts if uncomputed[key] == 1 else ()) for key in keys]
        for verdict in engine.step(items).verdicts:
            if verdict.error is not None:
                raise verdict.error
            lengths[verdict.key] += verdict.accepted + 1
            uncomputed[verdict.key] = 1

    return work


def _ids(count: int) -> list[int]:
    """Some tokens that any vocabulary has."""
    return [3 + 7 * place % 61 for place in range(count)]
