"""Compiled walks: verdicts equal to the reference's on awkward rows, whatever the modes, settings and company."""

import random
from collections.abc import Iterator

import pytest
import torch
from support import kernels as choices
from support.judging import assert_same, make_draft, make_logits

from dspark.messages import Mode, Sampling, SparseDistribution
from services.verifier.candidates import Candidate, Outcome
from services.verifier.kernels import verifier_kernels
from services.verifier.verification import verify

GREEDY = Sampling(temperature=0.0)
MODES = pytest.mark.parametrize("mode", list(Mode))


def compare(logits: torch.Tensor, requests: list[Candidate], candidates: int = 16) -> list[Outcome]:
    found = verifier_kernels(choices.named("llvm")).verify(logits, requests, noise_candidates=candidates)
    expected = verify(logits, requests, noise_candidates=candidates)
    assert_same(found, expected)
    return expected


def make_request(chance: random.Random, logits: torch.Tensor, mode: Mode, length: int) -> Candidate:
    first = chance.randrange(len(logits) - length)
    drafts = [make_draft(chance, logits[first + k]) for k in range(length)]
    sampling = Sampling(temperature=chance.choice([0.3, 1.0, 2.5]), seed=chance.getrandbits(64), mode=mode)
    known = tuple(distribution for _, distribution in drafts) if chance.random() < 0.8 else ()
    return Candidate(sampling, first, chance.randrange(1, 2000), tuple(token for token, _ in drafts), known)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@MODES
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("vocab", "candidates"), [(2, 4), (63, 16), (64, 64), (1025, 3), (20_032, 256)])
def test_walks_of_any_length(vocab: int, candidates: int, dtype: torch.dtype, mode: Mode) -> None:
    logits = make_logits(10, vocab, dtype)
    logits[:, 1] += 4  # so that drafts stand now and then
    chance = random.Random(vocab) if vocab > 6 else random.Random(1)
    if vocab < 6:
        logits = torch.nn.functional.pad(logits, (0, 6 - vocab), value=-9.0)
    requests = [make_request(chance, logits, mode, index % 9) for index in range(60)]
    outcomes = compare(logits, requests, candidates)
    assert max(o.accepted for o in outcomes) > 1
    assert any(o.accepted < len(r.draft_tokens) for o, r in zip(outcomes, requests, strict=True))
    for request, outcome in zip(requests, outcomes, strict=True):
        assert compare(logits, [request], candidates) == [outcome]


@MODES
def test_a_rest_that_wins(mode: Mode) -> None:
    """With one candidate nearly every token comes from the rest."""
    logits = make_logits(40, 1300, spread=0.5)
    outcomes = compare(logits, [Candidate(Sampling(seed=s, mode=mode), s, 30) for s in range(40)], candidates=1)
    best = logits.argmax(1).tolist()
    assert sum(o.token != own for o, own in zip(outcomes, best, strict=True)) > 30


@MODES
@pytest.mark.parametrize("value", [0.0, -0.0, -3.5])
def test_rows_of_one_number(mode: Mode, value: float) -> None:
    logits = torch.full((3, 4_000), value)
    logits[1, ::2] = 0.0 * -value  # the same, with the other sign where it is zero
    requests = [Candidate(Sampling(seed=s, mode=mode), 0, 9, (0, 5)) for s in range(30)]
    compare(logits, [*requests, Candidate(GREEDY, 0, 9, (0, 0))], candidates=16)


def test_whole_numbers_where_many_tie_at_the_edge_of_the_head() -> None:
    logits = make_logits(8, 3_000, spread=1.5).round()
    requests = [Candidate(Sampling(seed=s), s % 8, 5 + s) for s in range(64)]
    compare(logits, requests, candidates=64)


@MODES
def test_tokens_that_are_ruled_out(mode: Mode) -> None:
    logits = torch.full((4, 500), -torch.inf)
    logits[:, [7, 450]] = torch.tensor([1.0, 1.5])
    requests = [Candidate(Sampling(seed=s, mode=mode), 0, 9, (7, 450, 8)) for s in range(40)]
    tokens = {o.token for o in compare(logits, requests)}
    assert tokens == {7, 450}


def test_what_is_left_of_nothing_but_rounding_is_no_token() -> None:
    """All that has any weight was drafted as the target has it: what is left is rounding; token 0 is impossible."""
    logits = make_logits(1, 64, spread=0.1).repeat(2, 1)
    logits[:, 0] = -torch.inf
    shares = logits[0].double().softmax(-1)
    sparse = SparseDistribution(tuple(range(1, 64)), tuple(shares[1:].tolist()))
    requests = [Candidate(Sampling(seed=s, mode=Mode.REJECTION), 0, 9, (1 + s % 63,), (sparse,)) for s in range(2_000)]
    own = verifier_kernels(choices.named("llvm")).verify(logits, requests, noise_candidates=1)
    assert min(o.token for o in own) > 0


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 40.0, 1e30])
def test_temperatures_at_both_ends(temperature: float) -> None:
    logits = make_logits(5, 700)
    requests = [Candidate(Sampling(temperature=temperature, seed=s), s % 5, 9) for s in range(20)]
    compare(logits, requests)


@MODES
def test_broken_rows_end_their_own_walk_only(mode: Mode) -> None:
    logits = make_logits(6, 200)
    logits[:, 3] = 30.0
    logits[2, 150], logits[4] = -torch.nan, -torch.inf
    logits[5, 64] = torch.inf
    sampling = Sampling(mode=mode)
    requests = [Candidate(sampling, 0, 40, (3, 3, 3)), Candidate(sampling, 3, 40, (3,)), Candidate(sampling, 5, 40)]
    requests += [Candidate(GREEDY, r.first_row, r.position, r.draft_tokens) for r in requests]
    outcomes = compare(logits, [*requests, Candidate(sampling, 0, 40, (3,))])
    assert [o.error is None for o in outcomes] == [False] * 6 + [True]


def test_rows_that_do_not_lie_beside_each_other() -> None:
    wide = make_logits(6, 256)
    requests = [Candidate(Sampling(seed=s), s % 4, 9, (1,)) for s in range(12)]
    compare(wide[:, :192], requests)
    compare(wide.T.contiguous().T, requests)


@pytest.mark.usefixtures("threads")
def test_simple_requests_share_a_call_with_others() -> None:
    logits = make_logits(4, 640)
    settings = [Sampling(), Sampling(top_k=5), GREEDY, Sampling(logprobs=2), Sampling(mode=Mode.REJECTION)]
    compare(logits, [Candidate(own, row, 9, (1,)) for own in settings for row in range(3)])
