"""The draft service's kernels: block attention over contexts where they lie, and the sequential head."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support.blocks import Blocks, randn
from support.drafting import make_drafter

from dspark.kernels import TORCH
from dspark.kernels.triton_kernels import TRITON
from dspark.messages import Mode, Sampling
from dspark.models.drafters import DSparkDrafter
from dspark.models.drafters.heads import MarkovHead
from dspark.sampling import DraftChooser
from services.draft.drafting import Drafted
from services.draft.kernels import draft_kernels
from services.draft.kernels.sequential import ConfidenceRow, SequentialHead

TORCH_OWN, TRITON_OWN = draft_kernels(TORCH), draft_kernels(TRITON)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_block_attention(device: torch.device, dtype: torch.dtype, causal: bool) -> None:
    blocks = Blocks([(0, 0, 1), (5, 0, 7), (63, 2, 1), (64, 0, 33), (700, 0, 5)], dtype=dtype)
    expected, behind = blocks.run(TORCH_OWN, torch.device("cpu"), causal=causal)
    found, behind_too = blocks.run(TRITON_OWN, device, causal=causal)
    tolerance = 3e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(behind_too, behind, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (6, 2, 16), (2, 1, 256)])
def test_heads_of_all_sizes(device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
    blocks = Blocks([(9, 0, 3)], heads=heads, kv_heads=kv_heads, dim=dim)
    expected, _ = blocks.run(TORCH_OWN, torch.device("cpu"), causal=False)
    found, _ = blocks.run(TRITON_OWN, device, causal=False)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


def test_blocks_keep_their_bits_in_company(device: torch.device) -> None:
    lengths = [(5, 0, 7), (600, 0, 7), (130, 0, 7)]
    whole = Blocks(lengths)
    together, _ = whole.run(TRITON_OWN, device, causal=False)
    memory = whole.memory(TRITON_OWN, device)
    for number, span in enumerate(whole.spans(memory, device)):
        rows = slice(7 * number, 7 * number + 7)
        assert torch.equal(whole.attend(TRITON_OWN, memory, [span], rows, causal=False), together[rows])


# ---- the sequential head

SAMPLINGS = [
    Sampling(temperature=0.0),
    Sampling(seed=5),
    Sampling(seed=2**63 + 11, temperature=0.7, top_k=6),
    Sampling(seed=9, mode=Mode.REJECTION),
    Sampling(seed=10, mode=Mode.REJECTION, temperature=1.4, top_p=0.8),
    Sampling(seed=12, mode=Mode.REJECTION, top_k=3, min_p=0.1),
]


def head_of(drafter: DSparkDrafter, kernels: Any, device: torch.device, top_k: int) -> SequentialHead:
    drafter = drafter.to(device)
    return SequentialHead(
        head=drafter.head,
        bias=kernels.linear(drafter.head.markov_w2.weight),
        confidence=ConfidenceRow.of(drafter.confidence_head, drafter.config.hidden_size),
        d2t=drafter.d2t if drafter.d2t is None else drafter.d2t.to(device),
        chooser=DraftChooser(draft_top_k=top_k),
    )


def draft(kernels: Any, device: torch.device, samplings: list[Sampling], first: int = 0, **changes: Any) -> Drafted:
    shape: dict[str, Any] = {"hidden_size": 48, "num_layers": 1, "rope_thetas": (1e4,)}
    drafter = make_drafter(**(shape | changes))
    own = head_of(drafter, kernels, device, top_k=12)
    n, b, vocab = 3, 6, drafter.config.draft_vocab_size
    rows = slice(first, first + len(samplings))
    base, hidden = randn(b, n, vocab)[rows].to(device) * 2, randn(b, n, 48, seed=1)[rows].to(device)
    anchors, committed = [3, 511, 0, 7, 8, 9][rows], [1, 40, 41, 100_000, 9, 10][rows]
    return draft_kernels(kernels).draft_tokens(own, base, hidden, anchors, committed, samplings)


HEADS = [
    {"markov_head_type": "vanilla"},
    {"markov_head_type": "gated"},
    {"markov_head_type": "rnn"},
    {"draft_vocab_size": 128},
]


@pytest.mark.parametrize("changes", HEADS, ids=str)
def test_sequential_head(device: torch.device, changes: dict[str, Any]) -> None:
    expected = draft(TORCH, torch.device("cpu"), SAMPLINGS, **changes)
    found = draft(TRITON, device, SAMPLINGS, **changes)
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    assert found.others is not None
    assert expected.others is not None
    assert torch.equal(found.others.cpu(), expected.others)
    assert torch.equal(torch.stack(tuple(found.chosen)).cpu(), torch.stack(tuple(expected.chosen)))
    torch.testing.assert_close(found.top_logits().cpu(), expected.top_logits(), atol=1e-4, rtol=1e-4)
    assert found.confidence_logits is not None
    torch.testing.assert_close(found.confidence_logits.cpu(), expected.confidence_logits, atol=1e-4, rtol=1e-4)
    for step, other in zip(found.distributions, expected.distributions, strict=True):
        for own, theirs in zip(step, other, strict=True):
            assert (own is None) == (theirs is None)
            if own is not None and theirs is not None:
                assert own.token_ids == theirs.token_ids
                assert own.probabilities == pytest.approx(theirs.probabilities, rel=1e-4)


def test_heads_keep_their_bits_in_company(device: torch.device) -> None:
    together = draft(TRITON, device, SAMPLINGS)
    assert together.confidence_logits is not None
    for row in (1, 4):
        alone = draft(TRITON, device, SAMPLINGS[row : row + 1], first=row)
        assert alone.confidence_logits is not None
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert torch.equal(alone.confidence_logits[0], together.confidence_logits[row])
        assert [step[0] for step in alone.distributions] == [step[row] for step in together.distributions]


# ---- rows in tiles of 128 draft tokens

KINDS = [Sampling(temperature=0.0), Sampling(seed=5), Sampling(seed=9, mode=Mode.REJECTION)]


def draft_from(kernels: Any, device: torch.device, base: torch.Tensor, samplings: list[Sampling]) -> Drafted:
    """Of logits (b, n, vocabulary) that no previous token changes."""
    head = MarkovHead(base.shape[2], base.shape[2], 16, 48).to(device).requires_grad_(requires_grad=False)
    head.markov_w2.weight.zero_()
    own = SequentialHead(head, kernels.linear(head.markov_w2.weight), None, None, DraftChooser(draft_top_k=12))
    hidden = torch.zeros(*base.shape[:2], 48, device=device)
    b = len(base)
    return draft_kernels(kernels).draft_tokens(own, base.to(device), hidden, [0] * b, [7] * b, samplings)


@pytest.mark.parametrize("vocab", [1, 63, 128, 129, 300, 2000])
def test_most_likely_tokens_in_few_tiles(device: torch.device, vocab: int) -> None:
    """Spread over all tiles, the greatest at the very end, in one tile alone, or fewer than are asked for."""
    base = randn(4, 1, vocab).cumsum(0)
    base[1, 0, -1] = 50.0
    base[2, 0, 128 * ((vocab - 1) // 128) :] += 40.0
    base[3, 0, vocab // 2 + 1 :] = -torch.inf
    for sampling in KINDS:
        expected = draft_from(TORCH, torch.device("cpu"), base, [sampling] * 4)
        found = draft_from(TRITON, device, base, [sampling] * 4)
        assert torch.equal(found.tokens.cpu(), expected.tokens)
        assert found.others is not None
        assert expected.others is not None
        assert torch.equal(found.others.cpu(), expected.others)


def test_of_equal_tokens_in_many_tiles_the_lowest(device: torch.device) -> None:
    base = torch.zeros(3, 1, 1000)
    base[1, 0, [300, 290, 700, 130]] = -0.0
    base[2, 0, [999, 513, 640, 641]] = 3.0
    for sampling in KINDS:
        tokens = draft_from(TRITON, device, base, [sampling] * 3).tokens.flatten().tolist()
        assert max(tokens[:2]) < 12
        assert tokens[2] in ({513} if sampling.greedy else {*range(8), 513, 640, 641, 999})
    (equal,) = draft_from(TRITON, device, base[2:], [KINDS[2]]).distributions
    assert equal[0] is not None
    assert equal[0].token_ids == (513, 640, 641, 999, *range(8))
