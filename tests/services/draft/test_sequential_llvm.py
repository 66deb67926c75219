"""The compiled sequential head: the reference's tokens, and where it ships what it drew from, that law."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch

from dspark.kernels import team
from dspark.kernels.linear import linear
from dspark.messages import Mode, Sampling
from dspark.models.drafters.heads import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnHead
from dspark.sampling import DraftChooser
from services.draft.drafting import Drafted
from services.draft.kernels import sequential
from services.draft.kernels.sequential import ConfidenceRow, SequentialHead

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

from dspark.kernels import linear_int8, linear_llvm, product_llvm
from services.draft.kernels import sequential_llvm

LAYERS = {"float32": linear_llvm.linear, "bfloat16": linear_llvm.rounded_linear}
if product_llvm.compiled().codes is not None:
    LAYERS["int8"] = linear_int8.linear
VOCAB, RANK, HIDDEN = 128, 8, 16
GREEDY, COUPLED, REJECTION = Sampling(temperature=0.0), Sampling(), Sampling(mode=Mode.REJECTION)


def make_head(
    kind: type[MarkovHead] = MarkovHead, *, vocab: int = VOCAB, mapped: bool = False, top_k: int = 64
) -> SequentialHead:
    torch.manual_seed(3)
    head = kind(2 * vocab if mapped else vocab, vocab, RANK, HIDDEN).requires_grad_(requires_grad=False)
    d2t = torch.arange(vocab) if mapped else None  # the k-th draft token is the target's 2 k
    return SequentialHead(head, linear(head.markov_w2.weight), None, d2t, DraftChooser(draft_top_k=top_k))


def inputs(blocks: int, count: int = 4, *, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(5)
    return 2 * torch.randn(blocks, count, vocab, generator=made), torch.randn(blocks, count, HIDDEN, generator=made)


def both(own: SequentialHead, samplings: Sequence[Sampling]) -> tuple[Drafted, Drafted]:
    base, hidden = inputs(len(samplings), vocab=len(own.head.markov_w2.weight))
    anchors, lengths = range(len(samplings)), [10 + 3 * row for row in range(len(samplings))]
    found, expected = (
        draft(own, base, hidden, list(anchors), lengths, samplings)
        for draft in (sequential_llvm.draft_tokens, sequential.draft_tokens)
    )
    return found, expected


def assert_equal(found: Drafted, expected: Drafted) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert found.others is not None
    assert expected.others is not None
    assert torch.equal(found.others, expected.others)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(found.chosen, expected.chosen, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("kind", [MarkovHead, GatedMarkovHead, RnnHead])
def test_the_references_tokens(kind: type[MarkovHead], mapped: bool) -> None:
    samplings = [GREEDY, *(replace(COUPLED, seed=seed, temperature=0.3 + 0.1 * seed) for seed in range(12))]
    assert_equal(*both(make_head(kind, mapped=mapped, top_k=VOCAB), samplings))


def test_heads_in_bfloat16() -> None:
    own = make_head(top_k=VOCAB)
    own.head.bfloat16()
    own = replace(own, bias=linear(own.head.markov_w2.weight))
    assert_equal(*both(own, [GREEDY, *(replace(COUPLED, seed=seed) for seed in range(6))]))


def test_a_seed_of_sixty_four_bits() -> None:
    assert_equal(*both(make_head(top_k=VOCAB), [replace(COUPLED, seed=seed) for seed in (2**64 - 1, 2**63, 2**32)]))


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1.0, 50.0])
def test_any_temperature(temperature: float) -> None:
    found, expected = both(
        make_head(top_k=VOCAB), [replace(COUPLED, seed=s, temperature=temperature) for s in range(9)]
    )
    same = (found.tokens == expected.tokens).double().mean()
    assert same == 1.0 if temperature <= 1.0 else same > 0.9


def test_ties_go_to_the_lower_id_and_never_run_over() -> None:
    """All tokens are alike: no bound leaves few of them."""
    own = make_head(top_k=4)
    base, hidden = torch.zeros(3, 1, VOCAB), torch.zeros(3, 1, HIDDEN)
    own = replace(own, bias=lambda latent: torch.zeros(len(latent), VOCAB))
    drafted = sequential_llvm.draft_tokens(own, base, hidden, [1, 2, 3], [5, 5, 5], [GREEDY, COUPLED, REJECTION])
    assert drafted.tokens[0].tolist() == [0]
    assert drafted.tokens[1].item() < 4
    shipped = drafted.distributions[0][2]
    assert shipped is not None
    assert shipped.token_ids == (0, 1, 2, 3)
    assert shipped.probabilities == (0.25,) * 4


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_shipped_is_the_law_of_what_is_drawn(mapped: bool) -> None:
    own, count = make_head(mapped=mapped, top_k=9), 6000
    base, hidden = inputs(1, 1)
    samplings = [replace(REJECTION, seed=seed, temperature=1.3) for seed in range(count)]
    drafted = sequential_llvm.draft_tokens(
        own, base.expand(count, -1, -1), hidden.expand(count, -1, -1), [3] * count, [7] * count, samplings
    )
    shipped = drafted.distributions[0][0]
    assert shipped is not None
    assert 5 <= len(shipped.token_ids) <= 9
    assert all(one == shipped for one in drafted.distributions[0])
    logits = drafted.logits[0][0]
    best = logits.topk(len(shipped.token_ids)).indices.sort().values
    places = torch.tensor(shipped.token_ids) // 2 if mapped else torch.tensor(shipped.token_ids)
    assert torch.equal(places, best)
    expected = (logits[best].double() / 1.3).softmax(-1).numpy()
    assert np.allclose(shipped.probabilities, expected, atol=1e-9)
    seen = np.array([(drafted.tokens[:, 0] == token).sum().item() for token in shipped.token_ids])
    assert seen.sum() == count
    assert scipy.stats.chisquare(seen, expected * count).pvalue > 0.001
    assert scipy.stats.chisquare(seen, np.full(len(expected), count / len(expected))).pvalue < 1e-6


def test_a_row_does_not_see_the_others() -> None:
    own = make_head(mapped=True)
    samplings = [replace((COUPLED, REJECTION, GREEDY)[seed % 3], seed=seed) for seed in range(7)]
    base, hidden = inputs(7)
    together = sequential_llvm.draft_tokens(own, base, hidden, list(range(7)), [9] * 7, samplings)
    for row in range(7):
        part = slice(row, row + 1)
        alone = sequential_llvm.draft_tokens(own, base[part], hidden[part], [row], [9], samplings[part])
        assert torch.equal(alone.tokens, together.tokens[part])
        assert [step[0] for step in alone.distributions] == [step[row] for step in together.distributions]


@pytest.mark.parametrize("odd", [replace(COUPLED, top_k=3), replace(REJECTION, top_p=0.5), replace(COUPLED, min_p=0.2)])
def test_filtered_rows_are_the_references(odd: Sampling) -> None:
    found, expected = both(make_head(), [replace(odd, seed=1), replace(COUPLED, seed=2)])
    assert_equal(found, expected)
    assert list(found.distributions) == list(expected.distributions)


def test_an_odd_vocabulary_is_the_references() -> None:
    assert_equal(*both(make_head(vocab=101), [replace(COUPLED, seed=2)] * 2))


@pytest.mark.parametrize("blocks", [1, 2, 9])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("make", LAYERS)
def test_in_one_call_as_token_by_token(make: str, mapped: bool, blocks: int) -> None:
    """The same product, but for a wrapping behind which it cannot be seen: not a bit differs."""
    torch.manual_seed(4)
    vocab, rank = 160, 32
    head = MarkovHead(2 * vocab if mapped else vocab, vocab, rank, HIDDEN).requires_grad_(requires_grad=False)
    head.markov_w2.weight.copy_(head.markov_w2.weight.bfloat16())
    if mapped:
        head.rows = torch.arange(2 * vocab).flip(0)
    layer, confidence = LAYERS[make](head.markov_w2.weight), ConfidenceRow.of(ConfidenceHead(HIDDEN, rank), HIDDEN)
    chooser = DraftChooser(draft_top_k=20)
    own = SequentialHead(head, layer, confidence, torch.arange(vocab) if mapped else None, chooser)
    samplings = [replace((COUPLED, REJECTION, GREEDY)[n % 3], seed=n, temperature=0.4 + n % 3) for n in range(blocks)]
    samplings = [replace(one, temperature=0.0) if n % 3 == 2 else one for n, one in enumerate(samplings)]
    base, hidden = inputs(blocks, 5, vocab=vocab)
    anchors, lengths = list(range(blocks)), [20 + n for n in range(blocks)]
    found, expected = (
        sequential_llvm.draft_tokens(one, base, hidden, anchors, lengths, samplings)
        for one in (own, replace(own, bias=partial(layer.__call__)))
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert found.others is not None
    assert expected.others is not None
    assert torch.equal(found.others, expected.others)
    assert len(set(found.tokens.flatten().tolist())) > 3
    assert found.distributions == expected.distributions
    assert found.confidence_logits is not None
    assert expected.confidence_logits is not None
    assert torch.equal(found.confidence_logits, expected.confidence_logits)
    for ours, theirs in zip((*found.logits, *found.chosen), (*expected.logits, *expected.chosen), strict=True):
        assert torch.equal(ours, theirs)
