"""Every architecture as it is served against its own training-side forward, on contexts that come in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.drafting import attach, item, key_of, make_any, make_engine
from torch import Tensor

from dspark.errors import InvalidRequest
from dspark.kernels import Kernels
from dspark.messages import FeatureBlock, Mode, Sampling, SequenceKey
from dspark.models.drafters import ChainDrafter, Drafter, DSparkDrafter
from services.draft import chain
from services.draft.chain import ChainBlocks
from services.draft.drafting import Drafted
from services.draft.engine import DraftEngine

BLOCK, LAYERS = 5, 3  # LAYERS: of the target that are captured
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("dspark", {}),
    ("dspark", {"markov_head_type": "rnn", "num_kv_heads": 1, "draft_vocab_size": 128, "learned_mask": True}),
    ("dflash", {}),
    ("dflash", {"num_kv_heads": 1, "draft_vocab_size": 128, "learned_mask": True}),
    ("dflash", {"hidden_act": "gelu_pytorch_tanh", "embedding_scale": 8.0, "num_layers": 1, "rope_thetas": (1e6,)}),
    ("eagle3", {"num_layers": 1, "rope_thetas": (1e4,)}),
    ("eagle3", {"num_kv_heads": 1, "draft_vocab_size": 128, "normalize_inputs": True}),
    ("mtp", {"hidden_act": "gelu_pytorch_tanh", "embedding_scale": 8.0, "num_layers": 1, "rope_thetas": (1e6,)}),
    ("mtp", {"num_kv_heads": 4, "num_layers": 3, "rope_thetas": (1e4, 1e6, 1e4)}),
]
of_every_architecture = pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
of_each_once = pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3", "mtp"])


@dataclass(frozen=True)
class Text:
    """A sequence's ids and the target's hidden states on it (t, layers, d)."""

    ids: list[int]
    captured: Tensor

    @staticmethod
    def random(length: int, seed: int) -> "Text":
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(512, (length,), generator=generator).tolist()
        return Text(ids, torch.randn(length, LAYERS, 64, generator=generator))

    def give(self, engine: DraftEngine, drafter: Drafter, key: SequenceKey, start: int, stop: int) -> None:
        """Features of positions start … stop - 1 and the ids behind them."""
        if stop > start:
            engine.extend(key, drafter.features(self.captured[start:stop]), self.ids[start + 1 : stop + 1])


def block_of(engine: DraftEngine, text: Text, key: SequenceKey, length: int) -> Drafted:
    return engine.draft([item(key, length + 1, anchor=text.ids[length])])


def reference(drafter: Drafter, text: Text, length: int, drafted: Sequence[int]) -> Tensor:
    """Logits (block, draft vocabulary) of the training forward for a block anchored at `length` with these tokens.

    What stands behind the anchor is another text's, except for the drafts themselves: nothing may look at it.
    """
    behind = Text.random(BLOCK + 1, 99)
    ids = torch.tensor([[*text.ids[: length + 1], *drafted, 0]])
    captured = torch.cat([text.captured[:length], behind.captured])[None]
    if isinstance(drafter, ChainDrafter):  # mtp trains one step of what it serves
        drafter.config = replace(drafter.config, architecture="eagle3")
    hidden = drafter.training_hidden(captured, ids[:, : captured.shape[1]], torch.tensor([[length]]))[0]
    bias = drafter.sequential_logits(ids[:, length : length + BLOCK], hidden)
    logits = drafter.base_logits(hidden)
    return (logits if bias is None else logits + bias)[0]


def assert_is_the_modules(drafter: Drafter, text: Text, length: int, drafted: Drafted, row: int = 0) -> None:
    tokens = drafted.tokens[row].tolist()
    expected = reference(drafter, text, length, tokens)
    torch.testing.assert_close(torch.stack([part[row] for part in drafted.logits]), expected, atol=2e-4, rtol=1e-4)
    best = expected.argmax(-1)
    assert tokens == (best if drafter.d2t is None else best + drafter.d2t[best]).tolist()


@of_every_architecture
@pytest.mark.parametrize("length", [1, 2, 37, 300])
def test_a_served_block_is_the_training_forwards(
    architecture: str, changes: dict[str, Any], length: int, kernels: Kernels
) -> None:
    drafter, text = make_any(architecture, **changes), Text.random(length + 1, length)
    engine = make_engine(drafter, kernels=kernels)
    attach(engine, key_of())
    text.give(engine, drafter, key_of(), 0, length)
    assert_is_the_modules(drafter, text, length, block_of(engine, text, key_of(), length))


@of_every_architecture
def test_rounds_of_a_growing_context(architecture: str, changes: dict[str, Any], kernels: Kernels) -> None:
    """A block after every piece: its own rows must neither count nor harm what lands where they were."""
    drafter, text = make_any(architecture, **changes), Text.random(301, 5)
    engine = make_engine(drafter, kernels=kernels)
    attach(engine, key_of())
    done = 0
    for length in (1, 2, 3, 8, 9, 60, 254, 255, 262, 300):
        text.give(engine, drafter, key_of(), done, length)
        done = length
        assert engine.length(key_of()) == length
        first = block_of(engine, text, key_of(), length)
        assert torch.equal(block_of(engine, text, key_of(), length).tokens, first.tokens)
        assert_is_the_modules(drafter, text, length, first)


@of_each_once
def test_a_ragged_batch(architecture: str, kernels: Kernels) -> None:
    drafter = make_any(architecture)
    engine = make_engine(drafter, kernels=kernels)
    lengths = [1, 2, 7, 40, 41, 290]
    texts = [Text.random(length + 1, length) for length in lengths]
    keys = [key_of(str(number)) for number in range(len(texts))]
    for key, text, length in zip(keys, texts, lengths, strict=True):
        attach(engine, key)
        text.give(engine, drafter, key, 0, length)
    together = engine.draft(
        [item(k, n + 1, anchor=text.ids[n]) for k, text, n in zip(keys, texts, lengths, strict=True)]
    )
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        assert_is_the_modules(drafter, text, length, together, row)


@of_each_once
def test_blocks_of_many_sequences_over_the_wire(architecture: str, kernels: Kernels) -> None:
    """Messages of several sequences in one call, overlapping and out of step, in bfloat16 as they come."""
    drafter = make_any(architecture)
    engine, whole = make_engine(drafter, kernels=kernels), make_engine(drafter, kernels=kernels)
    texts = {key_of(str(number)): Text.random(70, number) for number in range(3)}
    messages = []
    for key, text in texts.items():
        for one in (engine, whole):
            attach(one, key)
        messages += [message(drafter, key, text, start, stop) for start, stop in ((0, 30), (25, 31), (31, 69))]
        assert whole.append_features([message(drafter, key, text, 0, 69)]) == []
    order = [0, 3, 1, 6, 4, 2, 7, 5, 8]
    assert engine.append_features([messages[number] for number in order[:4]]) == []
    assert engine.append_features([messages[number] for number in order[4:]]) == []
    items = [item(key, 70, anchor=text.ids[69]) for key, text in texts.items()]
    drafted, expected = engine.draft(items), whole.draft(items)
    assert drafted.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(drafted.top_logits(), expected.top_logits(), atol=1e-4, rtol=0.0)


def message(drafter: Drafter, key: SequenceKey, text: Text, start: int, stop: int) -> FeatureBlock:
    rows = drafter.features(text.captured[start:stop]).bfloat16()
    data = rows.contiguous().view(torch.uint8).numpy().tobytes()
    return FeatureBlock(key, start, stop - start, data, token_ids=tuple(text.ids[start + 1 : stop + 1]))


@of_each_once
def test_fewer_tokens_are_a_prefix_of_more(architecture: str) -> None:
    drafter, text = make_any(architecture), Text.random(21, 1)
    engine = make_engine(drafter)
    attach(engine, key_of(), sampling=Sampling(seed=4))
    text.give(engine, drafter, key_of(), 0, 20)
    whole = engine.propose([item(key_of(), 21)]).proposals[0]
    assert len(whole.tokens) == BLOCK
    assert len(whole.confidences) == (BLOCK if isinstance(drafter, DSparkDrafter) else 0)
    for count in range(1, BLOCK):
        assert engine.propose([item(key_of(), 21, max_tokens=count)]).proposals[0].tokens == whole.tokens[:count]


@of_each_once
@pytest.mark.parametrize("draft_vocab", [512, 128])
def test_every_architecture_chooses_as_the_request_says(architecture: str, draft_vocab: int) -> None:
    drafter, text = make_any(architecture, draft_vocab_size=draft_vocab), Text.random(21, 1)
    engine = make_engine(drafter, top_k=16)
    settings = [Sampling(seed=1, mode=Mode.REJECTION), Sampling(seed=2), Sampling(temperature=0.0, mode=Mode.REJECTION)]
    for number, sampling in enumerate(settings):
        attach(engine, key_of(str(number)), sampling=sampling)
        text.give(engine, drafter, key_of(str(number)), 0, 20)
    proposals = engine.propose([item(key_of(str(number)), 21) for number in range(3)]).proposals
    assert [len(proposal.distributions) for proposal in proposals] == [BLOCK, 0, 0]
    for token, distribution in zip(proposals[0].tokens, proposals[0].distributions, strict=True):
        assert token in distribution.token_ids
        assert sum(distribution.probabilities) == pytest.approx(1.0, abs=1e-6)
        assert all(token_id % (512 // draft_vocab) == 0 for token_id in distribution.token_ids)
    assert len({proposal.tokens for proposal in proposals}) == 3


@of_each_once
def test_a_sequence_of_one_token_is_drafted_for(architecture: str) -> None:
    engine = make_engine(make_any(architecture))
    attach(engine, key_of(), max_len=1)
    (proposal,) = engine.propose([item(key_of(), 1)]).proposals
    assert len(proposal.tokens) == BLOCK


# ---------------------------------------------------------------- what only chains have


@pytest.mark.parametrize("layers", [1, 2])
def test_long_prompts_go_through_in_pieces(layers: int, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> None:
    drafter, text = make_any("eagle3", num_layers=layers, rope_thetas=(1e4,) * layers), Text.random(104, 3)
    lengths = {key_of("a"): 103, key_of("b"): 16, key_of("c"): 17, key_of("d"): 1}
    messages = [message(drafter, key, text, 0, length) for key, length in lengths.items()]
    drafted = []
    for rows in (512, 16):
        monkeypatch.setattr(chain, "_PIECE_ROWS", rows)
        engine = make_engine(drafter, kernels=kernels)
        for key in lengths:
            attach(engine, key)
        assert engine.append_features(messages) == []
        drafted.append(engine.draft([item(key, n + 1, anchor=text.ids[n]) for key, n in lengths.items()]))
    assert drafted[0].tokens.tolist() == drafted[1].tokens.tolist()
    torch.testing.assert_close(*(one.top_logits() for one in drafted), atol=1e-4, rtol=0.0)


def test_ids_must_come_along() -> None:
    drafter, text = make_any("eagle3"), Text.random(20, 3)
    engine = make_engine(drafter)
    attach(engine, key_of())
    with pytest.raises(InvalidRequest, match="10 positions came with 0 token ids"):
        engine.extend(key_of(), drafter.features(text.captured[:10]))
    assert engine.length(key_of()) == 0


def test_what_failed_halfway_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, text = make_any("eagle3"), Text.random(41, 3)
    engine = make_engine(drafter)
    attach(engine, key_of())
    text.give(engine, drafter, key_of(), 0, 10)
    with monkeypatch.context() as broken:
        broken.setattr(ChainBlocks, "_rows_in", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            text.give(engine, drafter, key_of(), 10, 20)
    assert engine.length(key_of()) == 0
    text.give(engine, drafter, key_of(), 0, 40)
    assert_is_the_modules(drafter, text, 40, block_of(engine, text, key_of(), 40))
