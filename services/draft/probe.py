"""One block for each of some prompts, without a cluster: the way to check a drafter's checkpoint.

Runs the target and the drafter as they are served, except that features stay in the model's dtype instead of being
rounded to bfloat16 for the wire, and weights are never rounded to int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspark.errors import InvalidRequest, Mismatch
from dspark.messages import AttachSequence, ProposeItem, Sampling, SequenceKey
from dspark.models.batch import RaggedBatch
from dspark.models.drafters import Drafter
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.draft.offer import TapOffer

__all__ = ["Probe", "probe"]

_PIECE = 512  # rows of one forward
_PAGE = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one prompt: the target's greedy next token, and the drafter's greedy block behind it.

    `confidence_logits` are before the sigmoid, empty for a drafter without that head; `top1_logits` are base + bias
    logits of the block's tokens.
    """

    anchor: int
    tokens: list[int]
    confidence_logits: list[float]
    top1_logits: list[float]


def probe(target: TargetModel, drafter: Drafter, prompts: Sequence[Sequence[int]], *, path: Path) -> Iterator[Probe]:
    """A block for each prompt, at temperature 0. `path` is where the drafter was loaded from.

    Raises `Mismatch` where drafter and target do not belong together, `InvalidRequest` for prompts the target does not
    take; both before the first block.
    """
    _check_match(target, drafter, path)
    for index, prompt in enumerate(prompts):
        _check_prompt(f"prompt {index}", prompt, target)
    block = drafter.config.block_size
    longest = max(map(len, prompts), default=0) + block + 1
    engine = DraftEngine(
        drafter, DraftChooser(bits=target.kernels.keyed_bits), target.kernels, context_positions=longest + block
    )
    for prompt in prompts:
        anchor, features = _run_target(target, drafter, prompt)
        yield _draft(engine, [*prompt, anchor], features, block)


def _draft(engine: DraftEngine, ids: Sequence[int], features: Tensor, block: int) -> Probe:
    """Behind committed ids, the anchor last, of which all others have features."""
    key = SequenceKey("probe", 0)
    committed_len, anchor = len(ids), ids[-1]
    engine.attach(AttachSequence(key, "", Sampling(temperature=0.0), committed_len))
    engine.extend(key, features, ids[1:])
    drafted = engine.draft([ProposeItem(key, committed_len, anchor, block)])
    engine.detach([key])
    confidence = drafted.confidence_logits
    return Probe(
        anchor=anchor,
        tokens=drafted.tokens[0].tolist(),
        confidence_logits=confidence[0].tolist() if confidence is not None else [],
        top1_logits=drafted.top_logits()[0].tolist(),
    )


@torch.inference_mode()
def _run_target(target: TargetModel, drafter: Drafter, prompt: Sequence[int]) -> tuple[int, Tensor]:
    """The target's greedy next token, and the features (n, d) of all n positions of the prompt."""
    layers = drafter.config.target_layer_ids
    pages = -(-(len(prompt) + 1) // _PAGE) + 1
    cache = KVCache(
        target.config, pages=pages, page_size=_PAGE, dtype=target.kept_dtype, device=target.device, max_step_rows=_PIECE
    )
    sequence = cache.open(prompt, len(prompt) + 1)
    features = []
    for start in range(0, len(prompt), _PIECE):
        piece = prompt[start : start + _PIECE]
        forward = target.forward(RaggedBatch.build([(sequence, piece, start)]), cache, capture=frozenset(layers))
        features.append(drafter.features(torch.stack([forward.captured[layer] for layer in layers], 1)))
        cache.commit(sequence, prompt, start + len(piece))
    return int(target.logits(forward.hidden[-1:])[0].argmax()), torch.cat(features)


def _check_match(target: TargetModel, drafter: Drafter, path: Path) -> None:
    offer = TapOffer.of(drafter, path)
    offer.check(target.info)
    expected, present = drafter.config.num_target_layers, target.config.num_layers
    if expected != present:
        raise Mismatch(
            f"drafter {offer.drafter.name!r} is for {expected} layers, target {target.info.name!r} has {present}"
        )


def _check_prompt(name: str, prompt: Sequence[int], target: TargetModel) -> None:
    limit, vocab_size = target.config.max_context - 1, target.config.vocab_size
    if not 1 <= len(prompt) <= limit:
        raise InvalidRequest(f"{name} has {len(prompt)} token ids, expected 1 to {limit}")
    for token_id in prompt:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{name}: token id {token_id} is outside the vocabulary, 0 to {vocab_size - 1}")
