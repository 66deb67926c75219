"""The drafter's choices: what they agree with, what they are drawn from."""

from dataclasses import replace

import numpy as np
import scipy.stats
import torch
from support.markov import processed

from dspark.messages import Mode, Sampling
from dspark.sampling import DraftChooser
from dspark.sampling.choice import choose
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import process
from dspark.sampling.rows import SamplingRows


def draft_logits(vocab: int = 50, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(vocab) * 2


def test_greedy_takes_the_most_likely_and_maps_it() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 1.0, 2.0, 0.0]])
    d2t = torch.tensor([0, 6, 6, 6])
    choice = DraftChooser().choose(logits, [Sampling(temperature=0.0)] * 2, torch.tensor([4, 9]), d2t)
    assert choice.draft_index.tolist() == [1, 0]
    assert choice.tokens.tolist() == [7, 0]
    assert choice.distributions == [None, None]


def test_coupled_drafts_agree_with_a_target_of_the_same_distribution() -> None:
    count, logits = 500, draft_logits()
    samplings = [Sampling(seed=i, temperature=1.3, top_p=0.9) for i in range(count)]
    positions = torch.arange(count)
    choice = DraftChooser().choose(logits.repeat(count, 1), samplings, positions)
    rows = SamplingRows.of(samplings, logits.device)
    law = process(LogitRows.of(logits[None], [0] * count), rows, 256)
    assert torch.equal(choice.tokens, choose(law, rows.seed, positions.unsqueeze(-1)))
    assert len(set(choice.tokens.tolist())) > 5


def test_coupled_drafts_use_the_noise_of_target_ids() -> None:
    """Over a reduced vocabulary the agreement is as good as the distribution allows."""
    count, logits = 2000, draft_logits()
    kept = torch.arange(1, 50, 2)
    samplings = [Sampling(seed=i) for i in range(count)]
    positions = torch.full((count,), 17)
    d2t = kept - torch.arange(len(kept))
    choice = DraftChooser().choose(logits[kept].repeat(count, 1), samplings, positions, d2t)
    rows = SamplingRows.of(samplings, logits.device)
    target = choose(process(LogitRows.of(logits[None], [0] * count), rows, 256), rows.seed, positions.unsqueeze(-1))
    mass = float(logits.softmax(-1)[kept].sum())
    assert torch.equal(choice.tokens, choice.draft_index + d2t[choice.draft_index])
    # Whenever the target's choice is in the reduced vocabulary, the draft is the same token.
    agreed = choice.tokens == target
    assert agreed[target % 2 == 1].all()
    assert abs(float(agreed.double().mean()) - mass) < 4 * np.sqrt(mass * (1 - mass) / count)


def test_rejection_drafts_follow_the_distribution_they_ship() -> None:
    count, logits = 20_000, draft_logits()
    sampling = Sampling(mode=Mode.REJECTION, temperature=0.8, top_k=12, top_p=0.95, min_p=0.02)
    samplings = [replace(sampling, seed=i) for i in range(count)]
    choice = DraftChooser(draft_top_k=64).choose(logits.repeat(count, 1), samplings, torch.full((count,), 3))
    shipped = choice.distributions[0]
    assert shipped is not None
    assert all(q == shipped for q in choice.distributions)
    dense = np.zeros(50)
    dense[list(shipped.token_ids)] = shipped.probabilities
    assert np.abs(dense - processed(logits[None].numpy(), sampling)[0]).max() < 1e-6
    counts = np.bincount(choice.tokens.numpy(), minlength=50)
    assert counts[dense == 0].sum() == 0
    assert scipy.stats.chisquare(counts[dense > 0], dense[dense > 0] * count).pvalue > 0.001


def test_truncation_ships_so_many_tokens() -> None:
    logits = draft_logits().unsqueeze(0)
    choice = DraftChooser(draft_top_k=5).choose(logits, [Sampling(mode=Mode.REJECTION)], torch.tensor([3]))
    shipped = choice.distributions[0]
    assert shipped is not None
    assert list(shipped.token_ids) == logits[0].topk(5).indices.tolist()
    assert abs(sum(shipped.probabilities) - 1.0) < 1e-12


def test_rounds_have_noise_of_their_own_in_rejection_mode() -> None:
    logits, seeds = draft_logits().repeat(200, 1), range(200)
    samplings = [Sampling(seed=i, mode=Mode.REJECTION) for i in seeds]
    positions = torch.full((200,), 9)
    by_round = [
        DraftChooser().choose(logits, samplings, positions, committed=torch.full((200,), n)).tokens for n in (7, 8, 8)
    ]
    assert torch.equal(by_round[1], by_round[2])
    assert int((by_round[0] != by_round[1]).sum()) > 20


def test_mixed_modes_choose_as_alone() -> None:
    torch.manual_seed(5)
    logits = torch.randn(9, 3000) * 3
    samplings = [
        Sampling(seed=i, mode=mode, temperature=temperature, top_k=top_k)
        for i, (mode, temperature, top_k) in enumerate(
            (mode, temperature, top_k)
            for mode in Mode
            for temperature, top_k in ((0.0, 0), (1.0, 0), (0.7, 8), (1.0, 100))
        )
    ]
    samplings.append(Sampling(seed=8))
    positions = torch.arange(9) + 100
    together = DraftChooser().choose(logits, samplings, positions)
    for i, sampling in enumerate(samplings):
        alone = DraftChooser().choose(logits[i : i + 1], [sampling], positions[i : i + 1])
        assert together.tokens[i] == alone.tokens[0]
        assert together.distributions[i] == alone.distributions[0]
        assert (alone.distributions[0] is not None) == (sampling.mode is Mode.REJECTION and not sampling.greedy)
