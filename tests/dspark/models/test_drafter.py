"""The drafter against a plain reading of the paper, for every head."""

from pathlib import Path

import pytest
import torch
from support.drafters import BLOCK, HIDDEN, LAYER_IDS, VOCAB, PlainDrafter, save_published
from torch import Tensor

from dspark.models.drafters import DSparkDrafter, load_drafter
from dspark.models.drafters.dspark import block_mask

HEADS = ["vanilla", "gated", "rnn"]


def load(path: Path) -> DSparkDrafter:
    drafter = load_drafter(path, target_path=None, dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(drafter, DSparkDrafter)
    return drafter


def captured(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, len(LAYER_IDS), HIDDEN, generator=torch.Generator().manual_seed(seed))


def serve(drafter: DSparkDrafter, states: list[Tensor], anchors: list[int]) -> Tensor:
    """Block hidden states of several sequences in one batch, contexts padded to the longest."""
    contexts = [drafter.context_kv(drafter.features(s), torch.arange(len(s))) for s in states]
    lengths = torch.tensor([len(s) for s in states])
    padded = [
        tuple(torch.nn.utils.rnn.pad_sequence([c[layer][part] for c in contexts], batch_first=True) for part in (0, 1))
        for layer in range(drafter.config.num_layers)
    ]
    return drafter.block_hidden(torch.tensor(anchors), lengths, [(k, v) for k, v in padded], lengths)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_greedy_block_agrees_with_plain_reading(tmp_path: Path, head: str, n: int) -> None:
    tensors = save_published(tmp_path, head)
    drafter = load(tmp_path)
    hidden = serve(drafter, [captured(n)], [11])
    state, previous = drafter.head.initial_state(1), torch.tensor([11])
    tokens, confidences, tops = [], [], []
    for k in range(BLOCK):
        bias, state = drafter.head.step(state, previous, hidden[:, k])
        confidence = drafter.confidences(previous, hidden[:, k])
        assert confidence is not None
        logits = drafter.base_logits(hidden[:, k]) + bias
        previous = logits.argmax(-1)
        tokens.append(int(previous))
        confidences.append(float(confidence))
        tops.append(float(logits.max()))
    expected = PlainDrafter(tensors, head).draft(captured(n), 11)
    assert tokens == expected[0]
    assert confidences == pytest.approx(expected[1], abs=1e-4)
    assert tops == pytest.approx(expected[2], abs=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_unroll_equals_steps(tmp_path: Path, head: str) -> None:
    save_published(tmp_path, head)
    drafter = load(tmp_path)
    tokens, hidden = torch.randint(VOCAB, (3, BLOCK)), torch.randn(3, BLOCK, HIDDEN)
    state = drafter.head.initial_state(3)
    for k, latent in enumerate(drafter.head.unroll(tokens, hidden).unbind(1)):
        bias, state = drafter.head.step(state, tokens[:, k], hidden[:, k])
        torch.testing.assert_close(bias, drafter.head.markov_w2(latent))


def test_context_length_hides_what_lies_behind_it(tmp_path: Path) -> None:
    save_published(tmp_path)
    drafter = load(tmp_path)
    together = serve(drafter, [captured(3, 1), captured(20, 2)], [5, 6])
    torch.testing.assert_close(together[:1], serve(drafter, [captured(3, 1)], [5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:], serve(drafter, [captured(20, 2)], [6]), atol=1e-5, rtol=1e-5)


def test_context_in_pieces_equals_context_at_once(tmp_path: Path) -> None:
    save_published(tmp_path)
    drafter = load(tmp_path)
    features, positions = drafter.features(captured(12)), torch.arange(12)
    whole = drafter.context_kv(features, positions)
    first, second = drafter.context_kv(features[:5], positions[:5]), drafter.context_kv(features[5:], positions[5:])
    for layer, pair in enumerate(whole):
        for part, tensor in enumerate(pair):
            torch.testing.assert_close(torch.cat([first[layer][part], second[layer][part]]), tensor)


def test_training_forward_equals_serving_forward(tmp_path: Path) -> None:
    save_published(tmp_path)
    drafter = load(tmp_path)
    states, tokens = torch.stack([captured(16, 3), captured(16, 4)]), torch.randint(VOCAB, (2, 16))
    anchors = torch.tensor([[0, 3, 3], [9, 15, 1]])
    trained = drafter.training_hidden(states, tokens, anchors)
    for s in range(2):
        for a, position in enumerate(anchors[s].tolist()):
            served = serve(drafter, [states[s, :position]], [int(tokens[s, position])])
            torch.testing.assert_close(trained[s, a], served[0], atol=1e-5, rtol=1e-4)


def test_block_sees_context_before_its_anchor_and_itself_only() -> None:
    mask = block_mask(torch.tensor([[2, 0, 4]]), 2, 5)[0, 0]
    assert mask.shape == (6, 5 + 6)
    for row in range(6):
        block, anchor = row // 2, [2, 0, 4][row // 2]
        expected = [t < anchor for t in range(5)] + [key // 2 == block for key in range(6)]
        assert mask[row].tolist() == expected


def test_info_and_tap_tell_what_a_verifier_must_match(tmp_path: Path) -> None:
    tensors = save_published(tmp_path)
    drafter = load(tmp_path)
    assert drafter.info.tap_id == drafter.tap.tap_id
    assert (drafter.info.block_size, drafter.info.vocab_size, drafter.info.draft_vocab_size) == (BLOCK, VOCAB, VOCAB)
    assert drafter.tap.layer_ids == LAYER_IDS
    assert set(drafter.tap_tensors()) == {"fc.weight", "hidden_norm.weight"}
    assert all(tensor.dtype == torch.float32 for tensor in drafter.tap_tensors().values())
    torch.testing.assert_close(drafter.tap_tensors()["fc.weight"], tensors["fc.weight"])


def test_fingerprints_change_with_tensors(tmp_path: Path) -> None:
    save_published(tmp_path / "a", seed=0)
    save_published(tmp_path / "b", seed=1)
    first, again, other = load(tmp_path / "a"), load(tmp_path / "a"), load(tmp_path / "b")
    assert first.info == again.info
    assert first.fingerprint != other.fingerprint
    assert first.tap.tap_id != other.tap.tap_id
