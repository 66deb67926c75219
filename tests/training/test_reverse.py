"""Text first and drafts after it: the joint law is that of rejecting whole blocks, counted against its enumeration."""

import itertools
from collections import Counter, defaultdict

import pytest
import scipy.stats
import torch

from dspark.messages import Mode, Sampling
from training.reverse import ReverseChooser
from training.texts import Observed, Text

VOCAB, BLOCK, RUNS, TOP_K = 4, 2, 12_000, 3
KEPT = torch.tensor([0, 1, 3])  # the draft vocabulary of the second drafter
TEMPERATURE = 1.6

Outcome = tuple[tuple[int, ...], int, int]
"""Drafts up to the first that fell, how many stood, and the token after those."""


def logits_of(seed: int) -> torch.Tensor:
    """Next-token logits by previous token, (V, V)."""
    return 1.5 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


def shipped(row: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """q: a drafter's most likely tokens among `kept`, renormalised, (V,)."""
    values, at = row[kept].double().topk(TOP_K)
    return torch.zeros(VOCAB, dtype=torch.float64).scatter(0, kept[at], (values / TEMPERATURE).softmax(-1))


def rejection_law(target: torch.Tensor, drafter: torch.Tensor, kept: torch.Tensor) -> dict[Outcome, float]:
    """Everything that a round behind token 0 may come to, with its probability."""
    p = (target.double() / TEMPERATURE).softmax(-1)
    q = torch.stack([shipped(row, kept) for row in drafter])
    law: dict[Outcome, float] = defaultdict(float)
    for drafts in itertools.product(range(VOCAB), repeat=BLOCK):
        chain = [0, *drafts]
        drawn = float(torch.stack([q[a, b] for a, b in itertools.pairwise(chain)]).prod())
        if drawn == 0:
            continue
        weights = [1.0]
        for a, b in itertools.pairwise(chain):
            weights.append(min(1.0, weights[-1] * float(p[a, b] / q[a, b])))
        for accepted in reversed(range(BLOCK + 1)):
            weight, last = weights[accepted], p[chain[accepted]]
            stands = weight
            if accepted < BLOCK:
                left = (weight * last - q[chain[accepted]]).clamp_min(0)
                stands = float(left.sum() / (left.sum() + 1 - weight)) if accepted else 1.0
                last = left / left.sum()
            for token in range(VOCAB):
                if stands > 0:
                    law[drafts[: accepted + 1], accepted, token] += drawn * stands * float(last[token])
            drawn *= 1 - stands
    return law


class Forgetful(ReverseChooser):
    """Draws from q again, instead of from what is left of it, where the text's token is not drafted."""

    def _otherwise(self, p: torch.Tensor, q: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return super()._otherwise(torch.zeros_like(p), q, uniforms)


class Eager(ReverseChooser):
    """Drafts the text's token whenever it can."""

    def _noises(self, *arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        stand, place = super()._noises(*arguments)  # type: ignore[arg-type]
        return stand * 0.5, place


def counted(
    chooser: ReverseChooser, target: torch.Tensor, drafter: torch.Tensor, kept: torch.Tensor, *, whole: bool = False
) -> Counter[Outcome]:
    """Rounds behind token 0 along texts that the target wrote."""
    made = torch.Generator().manual_seed(11)
    p = (target.double() / TEMPERATURE).softmax(-1)
    words = [torch.zeros(RUNS, dtype=torch.int64)]
    for _ in range(BLOCK + 1):
        words.append(p[words[-1]].multinomial(1, generator=made)[:, 0])
    ids = torch.stack(words, 1)
    # With the identity as head, hidden rows are logits.
    hidden = target[ids[:, :-1]]
    log_z = torch.logsumexp(hidden.double() / TEMPERATURE, -1)
    texts = [
        Observed(Text(tuple(row), 1, 99, TEMPERATURE, seed), hidden[seed], torch.eye(VOCAB), {}, log_z[seed])
        for seed, row in enumerate(ids.tolist())
    ]
    samplings = [Sampling(temperature=TEMPERATURE, seed=seed, mode=Mode.REJECTION) for seed in range(RUNS)]
    chooser.expect(texts)
    committed = torch.ones(RUNS, dtype=torch.int64)
    d2t = None if len(kept) == VOCAB else kept - torch.arange(len(kept))
    if whole:  # every block in one call, as drafters ask whose tokens do not depend on each other
        rows = drafter[:1][:, kept].expand(RUNS * BLOCK, -1)
        each, places = committed.repeat_interleave(BLOCK), torch.arange(BLOCK).repeat(RUNS)
        again = [sampling for sampling in samplings for _ in range(BLOCK)]
        block = chooser.choose(rows, again, each + places, d2t, committed=each).tokens.view(RUNS, BLOCK)
        return tally(ids, block)
    drafts = [ids[:, 0]]
    for k in range(BLOCK):
        choice = chooser.choose(drafter[drafts[-1]][:, kept], samplings, committed + k, d2t, committed=committed)
        assert torch.equal(kept[choice.draft_index], choice.tokens)
        drafts.append(choice.tokens)
    return tally(ids, torch.stack(drafts[1:], 1))


def tally(ids: torch.Tensor, block: torch.Tensor) -> Counter[Outcome]:
    """Rounds with these drafts (n, block) along texts that begin with the anchor, (n, block + 2)."""
    same = (block == ids[:, 1 : BLOCK + 1]).long().cumprod(-1).sum(-1)
    return Counter(
        (tuple(row[: accepted + 1]), accepted, text[accepted + 1])
        for row, accepted, text in zip(block.tolist(), same.tolist(), ids.tolist(), strict=True)
    )


def p_value(seen: Counter[Outcome], law: dict[Outcome, float]) -> float:
    assert abs(sum(law.values()) - 1) < 1e-9
    outcomes = [outcome for outcome, share in law.items() if share > 0]
    if set(seen) - set(outcomes):
        return 0.0
    expected = torch.tensor([law[outcome] for outcome in outcomes], dtype=torch.float64) * RUNS
    observed = torch.tensor([seen[outcome] for outcome in outcomes], dtype=torch.float64)
    rare = expected < 5
    pairs = [torch.cat([values[~rare], values[rare].sum()[None]]) for values in (observed, expected)]
    kept = pairs[1] > 0
    return float(scipy.stats.chisquare(pairs[0][kept], pairs[1][kept]).pvalue)


@pytest.mark.parametrize("kept", [torch.arange(VOCAB), KEPT])
def test_the_joint_law_is_that_of_rejection_sampling(kept: torch.Tensor) -> None:
    target, drafter = logits_of(1), logits_of(1) + 0.7 * logits_of(2)
    law = rejection_law(target, drafter, kept)
    assert p_value(counted(ReverseChooser(draft_top_k=TOP_K), target, drafter, kept), law) > 0.01

    assert p_value(counted(Forgetful(draft_top_k=TOP_K), target, drafter, kept), law) < 1e-6
    assert p_value(counted(Eager(draft_top_k=TOP_K), target, drafter, kept), law) < 1e-6


def test_whole_blocks_in_one_call_follow_the_same_law() -> None:
    target, drafter = logits_of(1), (logits_of(1) + 0.7 * logits_of(2))[:1].expand(VOCAB, -1)
    law = rejection_law(target, drafter, KEPT)
    for kind, fits in ((ReverseChooser, True), (Forgetful, False)):
        p = p_value(counted(kind(draft_top_k=TOP_K), target, drafter, KEPT, whole=True), law)
        assert p > 0.01 if fits else p < 1e-6
