"""The served arithmetic against the module it is arranged from, and against a plain reading of the paper."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import drafters
from support.drafting import attach, feed, item, key_of, make_drafter, make_engine, make_features
from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import DSparkDrafter, load_drafter

VARIANTS: list[dict[str, Any]] = [
    {},
    {"markov_head_type": "gated", "num_kv_heads": 4, "confidence_with_markov": False},
    {"markov_head_type": "rnn", "num_kv_heads": 1, "draft_vocab_size": 128, "learned_mask": True},
    {"hidden_act": "gelu_pytorch_tanh", "embedding_scale": 8.0, "num_layers": 1, "rope_thetas": (1e6,)},
]


def module_block(drafter: DSparkDrafter, features: Tensor, anchor: int) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens, confidence logits and top logits by the module's own functions, the context in one piece."""
    n = len(features)
    context = [(k[None], v[None]) for k, v in drafter.context_kv(features, torch.arange(n))]
    hidden = drafter.block_hidden(torch.tensor([anchor]), torch.tensor([n]), context, torch.tensor([n]))
    state, previous = drafter.head.initial_state(1), torch.tensor([anchor])
    tokens, confidences, tops = [], [], []
    for k in range(drafter.config.block_size):
        bias, state = drafter.head.step(state, previous, hidden[:, k])
        confidence = drafter.confidences(previous, hidden[:, k])
        assert confidence is not None
        top, index = (drafter.base_logits(hidden[:, k]) + bias).max(-1)
        previous = index if drafter.d2t is None else index + drafter.d2t[index]
        tokens.append(int(previous))
        confidences.append(float(confidence))
        tops.append(float(top))
    return tokens, confidences, tops


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [0, 1, 37, 600])
def test_a_served_block_is_the_modules(variant: dict[str, Any], length: int, kernels: Kernels) -> None:
    drafter = make_drafter(**variant)
    engine, key, features = make_engine(drafter, kernels=kernels), key_of(), make_features(length).float()
    attach(engine, key, max_len=700)
    if length:
        engine.extend(key, features)
    drafted = engine.draft([item(key, length + 1)])
    tokens, confidences, tops = module_block(drafter, features, 7)
    assert drafted.confidence_logits is not None
    assert drafted.tokens[0].tolist() == tokens
    assert drafted.confidence_logits[0].tolist() == pytest.approx(confidences, abs=1e-4)
    assert drafted.top_logits()[0].tolist() == pytest.approx(tops, abs=1e-4)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("length", [3, 300])
def test_a_published_checkpoint_drafts_as_the_paper_reads(tmp_path: Path, head: str, length: int) -> None:
    tensors = drafters.save_published(tmp_path, head)
    drafter = load_drafter(tmp_path, target_path=None, dtype=torch.float32, device=torch.device("cpu"))
    made = torch.Generator().manual_seed(1)
    captured = torch.randn(length, len(drafters.LAYER_IDS), drafters.HIDDEN, generator=made)
    engine, key = make_engine(drafter), key_of()
    attach(engine, key)
    engine.extend(key, drafter.features(captured))
    drafted = engine.draft([item(key, length + 1, anchor=11)])
    tokens, confidences, tops = drafters.PlainDrafter(tensors, head).draft(captured, 11)
    assert drafted.confidence_logits is not None
    assert drafted.tokens[0].tolist() == tokens
    assert drafted.confidence_logits[0].tolist() == pytest.approx(confidences, abs=1e-4)
    assert drafted.top_logits()[0].tolist() == pytest.approx(tops, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_in_pieces_is_the_context_at_once(dtype: torch.dtype) -> None:
    engine, features = make_engine(make_drafter(dtype=dtype)), make_features(290)
    whole, pieces = key_of("whole"), key_of("pieces")
    for key, cuts in ((whole, ()), (pieces, (1, 2, 8, 100, 257))):
        attach(engine, key)
        feed(engine, key, features, cuts)
    drafted = engine.draft([item(whole, 291), item(pieces, 291)])
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    one, other = drafted.top_logits()
    assert drafted.tokens[0].tolist() == drafted.tokens[1].tolist()
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0.0)


def test_a_batch_of_ragged_sequences_is_each_alone() -> None:
    engine = make_engine(make_drafter(markov_head_type="rnn"))
    lengths = [0, 1, 5, 40, 41, 300]
    items = []
    for number, length in enumerate(lengths):
        key = key_of(str(number))
        attach(engine, key)
        if length:
            feed(engine, key, make_features(length, seed=number))
        items.append(item(key, length + 1, anchor=3 + number))
    together = engine.propose(items).proposals
    alone = [engine.propose([one]).proposals[0] for one in items]
    for proposal, expected in zip(together, alone, strict=True):
        assert proposal.tokens == expected.tokens
        assert proposal.confidences == pytest.approx(expected.confidences, abs=1e-5)


def test_drafting_leaves_the_context_as_it_was() -> None:
    """A block's own rows lie where the next features will: they must not count, nor harm what comes."""
    engine, features = make_engine(make_drafter()), make_features(280)
    busy, calm = key_of("busy"), key_of("calm")
    attach(engine, busy)
    attach(engine, calm)
    feed(engine, calm, features)
    for start in range(0, 280, 7):
        before = engine.draft([item(busy, start + 1)]).tokens
        assert torch.equal(engine.draft([item(busy, start + 1)]).tokens, before)
        engine.extend(busy, features[start : start + 7])
    drafted = engine.draft([item(busy, 281), item(calm, 281)])
    assert drafted.tokens[0].tolist() == drafted.tokens[1].tolist()
    torch.testing.assert_close(*drafted.top_logits(), atol=1e-4, rtol=0.0)


def test_fewer_tokens_are_a_prefix_of_more() -> None:
    engine, key = make_engine(make_drafter()), key_of()
    attach(engine, key)
    feed(engine, key, make_features(20))
    whole = engine.propose([item(key, 21)]).proposals[0]
    assert len(whole.tokens) == len(whole.confidences) == 5
    for count in range(5):
        part = engine.propose([item(key, 21, max_tokens=count)]).proposals[0]
        assert part.error is None
        assert part.tokens == whole.tokens[:count]
        assert part.confidences == pytest.approx(whole.confidences[:count], abs=1e-6)


def test_without_a_confidence_head_there_are_no_confidences() -> None:
    engine, key = make_engine(make_drafter(confidence_head=False)), key_of()
    attach(engine, key)
    (proposal,) = engine.propose([item(key, 1)]).proposals
    assert len(proposal.tokens) == 5
    assert proposal.confidences == ()
