"""The verify service's kernels: verdicts equal to the reference's, whatever the modes, filters and company."""

import random
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton")

from support.judging import assert_same, make_draft, make_logits
from support.verifying import make_tap

from dspark.errors import InternalError, InvalidRequest
from dspark.kernels import TORCH
from dspark.kernels.triton_kernels import TRITON
from dspark.messages import Mode, Sampling
from services.verifier.candidates import Candidate
from services.verifier.kernels import verify_triton
from services.verifier.taps import Tap
from services.verifier.verification import verify

GREEDY = Sampling(temperature=0.0)


def compare(logits: torch.Tensor, requests: Sequence[Candidate], device: torch.device, candidates: int) -> None:
    found = verify_triton.verify(logits.to(device), requests, noise_candidates=candidates)
    assert_same(found, verify(logits, requests, noise_candidates=candidates))


def make_requests(chance: random.Random, logits: torch.Tensor, mode: Mode, count: int) -> list[Candidate]:
    requests = []
    for index in range(count):
        first, length = chance.randrange(len(logits) - 3), index % 4
        drafts = [make_draft(chance, logits[first + k]) for k in range(length)]
        sampling = Sampling(
            temperature=chance.choice([0.5, 1.0, 2.0]),
            top_k=chance.choice([0, 0, 1, 5, 16, 30]),
            top_p=chance.choice([1.0, 0.9, 0.5]),
            min_p=chance.choice([0.0, 0.0, 0.05, 0.001]),
            seed=chance.getrandbits(64),
            mode=mode,
        )
        tokens, distributions = tuple(d[0] for d in drafts), tuple(d[1] for d in drafts)
        known = distributions if index % 5 else ()
        requests.append(Candidate(sampling, first, chance.randrange(1, 2000), tokens, known))
    return requests


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("vocab", "dtype"), [(40, torch.float32), (700, torch.bfloat16), (2500, torch.float32)])
def test_verdicts(device: torch.device, vocab: int, dtype: torch.dtype, mode: Mode) -> None:
    logits = make_logits(8, vocab, dtype)
    logits[:, 5] += 9  # so that drafts stand now and then
    logits[2, 10:] = -torch.inf
    requests = make_requests(random.Random(vocab), logits, mode, 8)
    compare(logits, requests, device, candidates=16)
    accepted = [o.accepted for o in verify(logits, requests, noise_candidates=16)]
    assert max(accepted) > 0
    assert any(n < len(r.draft_tokens) for n, r in zip(accepted, requests, strict=True))


FILTERS = [
    Sampling(),
    Sampling(top_k=16),  # as many as the head holds
    Sampling(top_k=17, temperature=3.0),
    Sampling(top_k=500),
    Sampling(top_p=0.99, temperature=1.5),  # far beyond the head
    Sampling(top_p=0.95, top_k=100, temperature=2.0),
    Sampling(min_p=0.001, temperature=2.0),
    Sampling(top_k=200, top_p=0.97, min_p=0.004, temperature=1.2),
    Sampling(temperature=1e-30),
    Sampling(temperature=50.0),
]


@pytest.mark.parametrize("own", FILTERS, ids=str)
def test_filters_inside_and_beyond_the_head(device: torch.device, own: Sampling) -> None:
    logits = make_logits(2, 300, torch.bfloat16, spread=1.0)  # full of ties
    requests = [
        Candidate(Sampling(own.temperature, own.top_k, own.top_p, own.min_p, seed=seed, logprobs=4), 1, 9)
        for seed in range(2)
    ]
    requests.append(
        Candidate(Sampling(own.temperature, own.top_k, own.top_p, own.min_p, mode=Mode.REJECTION), 0, 9, (7,))
    )
    compare(logits, requests, device, candidates=16)


def test_uniform_rows_and_ties(device: torch.device) -> None:
    """Whole numbers everywhere: what a filter cuts is exact, and the lower id goes first."""
    logits = torch.zeros(2, 90)
    for sampling in (Sampling(top_p=0.5, logprobs=20), Sampling(top_k=40, top_p=0.75), GREEDY):
        compare(logits, [Candidate(sampling, 0, 4), Candidate(sampling, 0, 4, (0,))], device, candidates=8)


def test_a_rest_that_wins(device: torch.device) -> None:
    """With one candidate nearly every token comes from the rest."""
    compare(make_logits(6, 130), [Candidate(Sampling(seed=s), s, 30) for s in range(6)], device, candidates=1)


def test_greedy(device: torch.device) -> None:
    logits = make_logits(6, 200, torch.bfloat16)
    best = [int(row.float().argmax()) for row in logits]
    walks = [(), tuple(best[:5]), (best[0], best[1] + 1, best[2]), (best[0] ^ 1,)]
    requests = [Candidate(Sampling(temperature=0.0, logprobs=3), 0, 12, drafts) for drafts in walks]
    requests += [Candidate(Sampling(temperature=0.0, mode=Mode.REJECTION), 0, 12, drafts) for drafts in walks]
    compare(logits, requests, device, candidates=32)


def test_more_logprobs_than_candidates(device: torch.device) -> None:
    compare(make_logits(2, 64), [Candidate(Sampling(logprobs=20, top_k=30), 0, 5)], device, candidates=4)


def test_refusals_and_broken_logits_hurt_nobody_else(device: torch.device) -> None:
    logits = make_logits(5, 50)
    logits[1, 3], logits[2], logits[4, 0] = torch.nan, -torch.inf, torch.inf
    requests = [Candidate(s, row, 5) for row in range(5) for s in (GREEDY, Sampling(seed=2))]
    requests.append(Candidate(GREEDY, 0, 5, (50,)))
    requests.append(Candidate(Sampling(mode=Mode.REJECTION), 0, 5, (int(logits[0].argmax()),)))  # may reach the NaN
    compare(logits, requests, device, candidates=16)
    found = verify_triton.verify(logits.to(device), requests, noise_candidates=16)
    assert isinstance(found[2].error, InternalError)
    assert isinstance(found[10].error, InvalidRequest)
    assert verify_triton.verify(logits.to(device), []) == []


def test_company_changes_nothing(device: torch.device) -> None:
    logits = make_logits(8, 700)
    requests = make_requests(random.Random(5), logits, Mode.REJECTION, 4)
    together = verify_triton.verify(logits.to(device), requests, noise_candidates=16)
    alone = [verify_triton.verify(logits.to(device), [one], noise_candidates=16)[0] for one in requests]
    assert together == alone


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_taps(device: torch.device, rows: int, normalize: bool) -> None:
    info, tensors = make_tap(bias=normalize, normalize_inputs=normalize)
    states = {layer: torch.randn(12, 64).bfloat16()[12 - rows :] for layer in info.layer_ids}
    expected = Tap(info, tensors, TORCH).project(states)
    on = {layer: state.to(device) for layer, state in states.items()}
    found = Tap(info, tensors, TRITON, device).project(on)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu(), expected, atol=1e-2, rtol=1e-2)


# ---- rows in tiles of 32 tokens, programs of 4,096, sums of 8,192


LAWS = [GREEDY, Sampling(seed=3), Sampling(seed=4, top_p=0.9), Sampling(seed=5, mode=Mode.REJECTION)]


@pytest.mark.parametrize("vocab", [1, 31, 63, 4097, 8200])
def test_rows_of_all_lengths(device: torch.device, vocab: int) -> None:
    """Even, the greatest at the very end, all that is possible in the last tile or in one token."""
    logits = make_logits(5, vocab, spread=0.5)
    logits[1, -1] = 30.0
    logits[2, : 32 * ((vocab - 1) // 32)] = -torch.inf
    logits[3, : vocab // 2], logits[3, vocab // 2 + 1 :] = -torch.inf, -torch.inf
    drafts = logits[:4].argmax(-1).tolist()
    requests = [Candidate(law, first, 7, tuple(drafts[first:4])) for law in LAWS for first in range(5)]
    compare(logits, requests, device, candidates=16)


def test_the_draw_falls_into_the_last_part(device: torch.device) -> None:
    """All but a rejected draft token lies behind 8,192 others; or nothing does but the draft token."""
    logits = torch.full((3, 8300), -torch.inf)
    logits[:, 8250:] = make_logits(3, 50)
    logits[1, 5], logits[2, 8299] = 2.0, 30.0
    for seed in range(6):
        sampling = Sampling(seed=seed, mode=Mode.REJECTION)
        compare(logits, [Candidate(sampling, row, 9, (token,)) for row, token in ((0, 8260), (1, 5))], device, 16)


def test_equal_logits_far_apart(device: torch.device) -> None:
    """Of tokens alike in all tiles and programs the lower id goes first, whether by value or by the sign of zero."""
    logits = torch.zeros(3, 5000)
    logits[1, 4000:] = -0.0
    logits[2, [4999, 4100, 33, 32]] = 1.0
    requests = [
        Candidate(law, row, 6, (int(logits[row].argmax()),) if row < 2 else ())
        for row in range(3)
        for law in (GREEDY, Sampling(seed=1, top_k=5, logprobs=5), Sampling(seed=2, top_k=40, logprobs=8))
    ]
    compare(logits, requests, device, candidates=8)
    (one,) = verify_triton.verify(logits.to(device), [Candidate(Sampling(top_k=5, logprobs=5), 2, 6)])
    assert [token.token_id for token in one.logprobs[0].top] == [32, 33, 4100, 4999, 0]


def test_a_rest_picked_in_any_tile(device: torch.device) -> None:
    """Nearly every token comes from the rest, with and without a cut in it."""
    logits = make_logits(8, 4200, spread=0.3)
    for filters in ({}, {"top_k": 3000}, {"min_p": 0.2}):
        requests = [Candidate(Sampling(seed=row, **filters), row, 30) for row in range(8)]
        compare(logits, requests, device, candidates=2)
