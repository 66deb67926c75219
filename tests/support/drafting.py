"""Random drafters for the tiny targets, and features for them."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dspark.kernels import TORCH, Kernels
from dspark.messages import AttachSequence, FeatureBlock, ProposeItem, Sampling, SequenceKey
from dspark.models.drafters import CLASSES, Drafter, DrafterConfig, DSparkDrafter
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.draft.ngram import PromptLookup

GREEDY = Sampling(temperature=0.0)

_SHAPES: dict[str, Any] = {
    "block_size": 5,
    "target_layer_ids": (-1, 1, 3),
    "vocab_size": 512,
    "draft_vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_target_layers": 6,
    "markov_rank": 8,
    "mask_token_id": 511,
    "name": "tiny",
    "rope_thetas": (10_000.0, 500_000.0),
}


def make_config(**changes: Any) -> DrafterConfig:
    """A tiny drafter's config."""
    return DrafterConfig(**(_SHAPES | changes))


def make_drafter(*, seed: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> DSparkDrafter:
    """A random DSpark drafter, as `make_any` makes them."""
    return cast("DSparkDrafter", make_any("dspark", seed=seed, dtype=dtype, **changes))


def make_any(architecture: str, *, seed: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Drafter:
    """A random drafter; every weight matters, norms included. A reduced vocabulary takes every other target id."""
    heads = {} if architecture == "dspark" else {"markov_rank": 0, "confidence_head": False}
    config = make_config(architecture=architecture, **(heads | changes))
    torch.manual_seed(seed)
    embed = torch.randn(config.vocab_size, config.hidden_size)
    head = torch.randn(config.draft_vocab_size, config.hidden_size) * 0.3
    reduced = config.draft_vocab_size < config.vocab_size
    step = config.vocab_size // config.draft_vocab_size
    d2t = torch.arange(config.draft_vocab_size) * (step - 1) if reduced else None
    drafter = CLASSES[architecture](config, embed_weight=embed.to(dtype), head_weight=head.to(dtype), d2t=d2t)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name else 0.0))
    return drafter.to(dtype).eval().requires_grad_(requires_grad=False)


def make_engine(
    drafter: Drafter | PromptLookup,
    *,
    positions: int = 1 << 16,
    top_k: int = 16,
    lookup: bool = False,
    kernels: Kernels = TORCH,
) -> DraftEngine:
    """An engine over it."""
    chooser = DraftChooser(draft_top_k=top_k)
    return DraftEngine(drafter, chooser, kernels, context_positions=positions, lookup=lookup)


def key_of(name: str = "a", epoch: int = 0) -> SequenceKey:
    """A sequence."""
    return SequenceKey(name, epoch)


def attach(engine: DraftEngine, key: SequenceKey, *, sampling: Sampling = GREEDY, max_len: int = 512) -> None:
    """Attach a sequence whose features the test brings itself."""
    engine.attach(AttachSequence(key, "127.0.0.1:1", sampling, max_len))


def make_features(count: int, *, hidden: int = 64, seed: int = 0) -> Tensor:
    """Features as they come over the wire: bfloat16 (count, hidden)."""
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()


def token_at(position: int) -> int:
    """The committed id there, in sequences whose text does not matter."""
    return (37 * position + 11) % 512


def block_of(key: SequenceKey, features: Tensor, start: int, stop: int) -> FeatureBlock:
    """The message that carries rows start … stop - 1, and the ids behind them."""
    data = features[start:stop].contiguous().view(torch.uint8).numpy().tobytes()
    ids = tuple(token_at(position + 1) for position in range(start, stop))
    return FeatureBlock(key, start, stop - start, data, token_ids=ids)


def feed(engine: DraftEngine, key: SequenceKey, features: Tensor, pieces: Sequence[int] = ()) -> None:
    """All rows, cut at `pieces`."""
    cuts = [0, *pieces, len(features)]
    for start, stop in itertools.pairwise(cuts):
        assert engine.append_features([block_of(key, features, start, stop)]) == []


def item(key: SequenceKey, committed_len: int, *, anchor: int = 7, max_tokens: int = 5) -> ProposeItem:
    """Ask for a block."""
    return ProposeItem(key, committed_len, anchor, max_tokens)
