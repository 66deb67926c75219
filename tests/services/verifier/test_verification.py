"""What verify() answers: modes, walks, refusals, log-probabilities, and that company changes nothing."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import kernels as choices
from support.markov import World, generate, processed

from dspark.errors import InternalError, InvalidRequest
from dspark.messages import Mode, Sampling, SparseDistribution
from dspark.sampling import DraftChooser
from services.verifier.candidates import Candidate, Outcome
from services.verifier.kernels import verifier_kernels

GREEDY = Sampling(temperature=0.0)
MODES = pytest.mark.parametrize("mode", list(Mode))
Verify = Callable[..., list[Outcome]]


@pytest.fixture(params=["torch", "llvm"])
def verify(request: pytest.FixtureRequest) -> Verify:
    return verifier_kernels(choices.named(request.param)).verify


def rows(*best: int, vocab: int = 40) -> torch.Tensor:
    """Logits whose most likely tokens are these."""
    torch.manual_seed(0)
    logits = torch.rand(len(best), vocab)
    logits[torch.arange(len(best)), torch.tensor(best)] = 9.0
    return logits


@MODES
def test_greedy_accepts_up_to_the_first_difference(mode: Mode, verify: Verify) -> None:
    logits, greedy = rows(3, 5, 7, 9), replace(GREEDY, mode=mode)
    walks = [(), (3,), (3, 5, 7), (3, 6, 7), (4, 5, 7)]
    outcomes = verify(logits, [Candidate(greedy, 0, 12, drafts) for drafts in walks])
    assert [(o.accepted, o.token) for o in outcomes] == [(0, 3), (1, 5), (3, 9), (1, 5), (0, 3)]


def test_greedy_ties_take_the_lower_id(verify: Verify) -> None:
    logits = torch.zeros(1, 20_000).bfloat16()
    logits[0, [19_000, 700, 12_345]] = 2.5
    assert verify(logits, [Candidate(GREEDY, 0, 1)]) == [Outcome(0, 700)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modes_lengths_and_samplings_mix(dtype: torch.dtype, verify: Verify) -> None:
    logits = rows(3, 5, 7, 9, 11, 13).to(dtype)
    q = SparseDistribution((5, 6), (0.5, 0.5))
    requests = [
        Candidate(Sampling(seed=1, temperature=0.1), 4, 30, (11,)),
        Candidate(GREEDY, 0, 12, (3, 5)),
        Candidate(Sampling(mode=Mode.REJECTION, temperature=0.1), 1, 12, (5,), (q,)),
        Candidate(Sampling(mode=Mode.REJECTION, top_k=1), 2, 12, (7, 9, 12)),
        Candidate(Sampling(top_k=1), 3, 12),
    ]
    outcomes = verify(logits, requests)
    assert [(o.accepted, o.token) for o in outcomes] == [(1, 13), (2, 7), (1, 7), (2, 11), (0, 9)]
    assert outcomes == [verify(logits, [request])[0] for request in requests]


def test_no_requests(verify: Verify) -> None:
    assert verify(rows(1), []) == []


# ---- refusals


@pytest.mark.parametrize(
    ("drafts", "distributions", "message"),
    [
        ((40,), (), "draft_tokens: 40 is outside"),
        ((-1,), (), "draft_tokens: -1 is outside"),
        ((1, 2), (SparseDistribution((1,), (1.0,)),), "draft_distributions: 1 for 2"),
        ((1,), (SparseDistribution((1, 2), (1.0,)),), "2 token ids and 1 prob"),
        ((1,), (SparseDistribution((1, 40), (0.5, 0.5)),), "inside the vocabulary of 40"),
        ((1,), (SparseDistribution((1, 1), (0.5, 0.5)),), "distinct"),
        ((1,), (SparseDistribution((1, 2), (0.5, 0.4)),), "sum to 1"),
        ((1,), (SparseDistribution((1, 2), (1.5, -0.5)),), "negative"),
        ((1,), (SparseDistribution((1, 2), (float("nan"), 0.5)),), "sum to 1"),
        ((1,), (SparseDistribution((2, 3), (0.5, 0.5)),), "cannot have been drawn"),
        ((1,), (SparseDistribution((1, 3), (0.0, 1.0)),), "cannot have been drawn"),
    ],
)
def test_bad_drafts_fail_alone(
    drafts: tuple[int, ...], distributions: tuple[SparseDistribution, ...], message: str, verify: Verify
) -> None:
    bad = Candidate(Sampling(mode=Mode.REJECTION), 0, 5, drafts, distributions)
    good = Candidate(GREEDY, 1, 5)
    first, refused, last = verify(rows(3, 5, 7), [good, bad, good])
    assert isinstance(refused.error, InvalidRequest)
    assert message in str(refused.error)
    assert first == last == Outcome(0, 5)


def test_broken_logits_fail_alone(verify: Verify) -> None:
    logits = rows(3, 5, 7)
    logits[1, 9] = torch.nan
    for sampling in (GREEDY, Sampling(top_k=1), Sampling(mode=Mode.REJECTION, top_k=1)):
        first, broken, last = verify(logits, [Candidate(sampling, row, 5) for row in range(3)])
        assert isinstance(broken.error, InternalError)
        assert (first.token, last.token) == (3, 7)
        assert first.error is last.error is None


def test_rows_that_are_not_there_are_a_bug_of_the_caller(verify: Verify) -> None:
    with pytest.raises(InternalError, match="rows 1 to 3 of 3"):
        verify(rows(3, 5, 7), [Candidate(GREEDY, 1, 5, (5, 7))])


# ---- rejection


def test_a_draft_without_distribution_counts_as_certain(verify: Verify) -> None:
    """It stands with probability p, and what replaces it is the target without it."""
    count, torch_rows = 20_000, torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 0.0]])
    logits = torch.cat((torch_rows[:1].log(), torch_rows[1:]))
    seeds = [Sampling(mode=Mode.REJECTION, seed=i) for i in range(count)]
    for empty in ((), (SparseDistribution((), ()),)):
        outcomes = verify(logits, [Candidate(s, 0, 8, (1,), empty) for s in seeds])
        accepted = np.mean([o.accepted for o in outcomes])
        instead = np.bincount([o.token for o in outcomes if not o.accepted], minlength=3) / count
        assert abs(accepted - 0.3) < 0.015
        assert np.abs(instead - [0.5, 0.0, 0.2]).max() < 0.015


def test_a_draft_outside_the_support_never_stands(verify: Verify) -> None:
    sampling = Sampling(mode=Mode.REJECTION, top_k=2)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(2, 1)
    q = SparseDistribution((2, 3), (0.5, 0.5))
    outcomes = verify(logits, [Candidate(replace(sampling, seed=i), 0, 4, (2,), (q,)) for i in range(300)])
    assert all(o.accepted == 0 and o.token in {0, 1} for o in outcomes)
    assert {o.token for o in outcomes} == {0, 1}


def test_a_perfect_drafter_is_never_rejected(verify: Verify) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 30).repeat(2, 1)
    samplings = [Sampling(mode=Mode.REJECTION, seed=i, temperature=0.7, top_p=0.9) for i in range(2000)]
    choice = DraftChooser().choose(logits[:1].repeat(2000, 1), samplings, torch.full((2000,), 4))
    requests = [
        Candidate(s, 0, 4, (token,), (q,))
        for s, token, q in zip(samplings, choice.tokens.tolist(), choice.distributions, strict=True)
        if q is not None
    ]
    assert len(requests) == 2000
    assert all(o.accepted == 1 for o in verify(logits, requests))


# ---- coupled: a function of seed and target alone


def test_coupled_tokens_do_not_depend_on_speculation() -> None:
    world = World.random(4, 12)
    requests = [Sampling(seed=i, temperature=1.2, top_p=0.95, min_p=0.01) for i in range(60)]
    plain = generate(world, requests, 12, lengths=lambda _, drafts: np.zeros(len(drafts), dtype=int))
    assert plain.verified == 0
    other = World(world.target, World.random(5, 12).drafter)
    reduced = World(world.target, world.drafter[:, 3:9], torch.full((6,), 3))
    for drafts, block in ((world, 1), (world, 3), (world, 7), (other, 4), (reduced, 4)):
        run = generate(drafts, requests, 12, block=block, chooser=DraftChooser(draft_top_k=4))
        assert np.array_equal(run.tokens, plain.tokens)
        assert min(run.accepted, run.rejected) > 0
    # All of the present drafts decide, as no exact rejection scheduler may.
    run = generate(world, requests, 12, block=4, plan=lambda drafts: drafts.sum(1) % 5)
    assert np.array_equal(run.tokens, plain.tokens)
    alone = generate(world, requests[17:18], 12, block=2)
    assert np.array_equal(alone.tokens[0], plain.tokens[17])


def test_positions_and_seeds_have_noise_of_their_own(verify: Verify) -> None:
    logits = torch.zeros(1, 1000)
    at = [verify(logits, [Candidate(Sampling(seed=s), 0, n)])[0].token for s in range(8) for n in range(8)]
    assert len(set(at)) > 50
    assert verify(logits, [Candidate(Sampling(seed=3), 0, 5)])[0].token == at[3 * 8 + 5]


# ---- log-probabilities


@pytest.mark.parametrize("noise_candidates", [4, 256])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 6}, {"top_p": 0.6}, {"top_p": 0.9}])
def test_logprobs_are_of_the_processed_distribution(
    settings: dict[str, float], noise_candidates: int, verify: Verify
) -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 30) * 2
    sampling = Sampling(logprobs=8, seed=4, **settings)  # type: ignore[arg-type]
    with np.errstate(divide="ignore"):
        expected = np.log(processed(logits.numpy(), sampling))
    free = [verify(logits, [Candidate(sampling, i, 7 + i)])[0].token for i in range(2)]
    (outcome,) = verify(logits, [Candidate(sampling, 0, 7, tuple(free))], noise_candidates=noise_candidates)
    tokens = [*free[: outcome.accepted], outcome.token]
    assert len(outcome.logprobs) == outcome.accepted + 1
    for row, token, entry in zip(expected, tokens, outcome.logprobs, strict=False):
        order = [int(i) for i in np.lexsort((np.arange(30), -row))[:8] if row[i] > -np.inf]
        assert entry.chosen.token_id == token
        assert abs(entry.chosen.logprob - row[token]) < 1e-5
        assert [t.token_id for t in entry.top] == order
        assert np.allclose([t.logprob for t in entry.top], row[order], atol=1e-5)


def test_logprobs_at_temperature_0_are_the_models_own(verify: Verify) -> None:
    logits = rows(3, 5)
    greedy = Sampling(temperature=0.0, top_k=1, logprobs=2)
    (outcome,) = verify(logits, [Candidate(greedy, 0, 3, (3,))])
    expected = logits.double().log_softmax(-1)
    assert [entry.chosen.token_id for entry in outcome.logprobs] == [3, 5]
    for entry, row in zip(outcome.logprobs, expected, strict=True):
        assert abs(entry.chosen.logprob - row.max()) < 1e-5
        assert [t.token_id for t in entry.top] == row.topk(2).indices.tolist()
    (chosen_only,) = verify(logits, [Candidate(replace(greedy, logprobs=0), 0, 3)])
    assert chosen_only.logprobs[0].top == ()


# ---- batch invariance, bit for bit, at a real vocabulary

VOCAB = 262_144
SETTINGS = [
    Sampling(seed=1, logprobs=3),
    Sampling(seed=2, temperature=0.8, logprobs=3),
    Sampling(seed=3, top_k=40, top_p=0.9, logprobs=3),
    Sampling(seed=4, temperature=1.5, top_p=0.97, logprobs=3),
    Sampling(seed=5, temperature=1.5, top_k=3000, min_p=1e-5, logprobs=3),
    Sampling(temperature=0.0, logprobs=3),
]


def wide_logits(count: int) -> torch.Tensor:
    torch.manual_seed(7)
    logits = torch.randn(count, VOCAB) * 2
    logits[:, :40] += torch.linspace(12, 4, 40)
    return logits.bfloat16()


def wide_requests(count: int, logit_rows: int) -> list[Candidate]:
    q = SparseDistribution(tuple(range(32)), (1 / 32,) * 32)
    made = []
    for i in range(count):
        sampling = replace(SETTINGS[i % len(SETTINGS)], seed=i, mode=Mode.REJECTION if i % 4 == 3 else Mode.COUPLED)
        drafts = tuple((i + k) % 32 for k in range(i % 3))
        distributions = (q,) * len(drafts) if sampling.mode is Mode.REJECTION else ()
        made.append(Candidate(sampling, i % (logit_rows - 2), 100 + i, drafts, distributions))
    return made


@pytest.mark.parametrize("others", [16, 300])
def test_a_request_is_judged_alike_alone_and_in_company(others: int, verify: Verify) -> None:
    logits, threads = wide_logits(10), torch.get_num_threads()
    requests = wide_requests(others + 1, len(logits))
    together = verify(logits, requests)
    assert verify(logits, requests[::-1])[::-1] == together
    watched = range(0, others + 1, max(1, others // 24))
    assert [verify(logits, [requests[i]])[0] for i in watched] == [together[i] for i in watched]
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert [verify(logits, [requests[i]])[0] for i in watched[:8]] == [together[i] for i in watched[:8]]
    finally:
        torch.set_num_threads(threads)
