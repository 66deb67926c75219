"""Processed distributions equal their definition, on short and on long rows, inside and beyond the head."""

import numpy as np
import pytest
import torch
from support import kernels as choices
from support.markov import processed

from dspark.kernels.logits import LogitKernels
from dspark.messages import Sampling
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import Law, process
from dspark.sampling.rows import SamplingRows

FILTERS = {
    "none": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.05},
    "freezing": {"temperature": 1e-300},
    "boiling": {"temperature": 1e300},
    "top_k": {"top_k": 20},
    "top_k of all": {"top_k": 10**6},
    "top_k beyond": {"top_k": 700},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.5},
    "top_p beyond": {"top_p": 0.97, "temperature": 1.5},
    "top_p tiny": {"top_p": 1e-9},
    "min_p": {"min_p": 0.1},
    "min_p beyond": {"min_p": 1e-4, "temperature": 1.5},
    "top_k, top_p": {"top_k": 60, "top_p": 0.9},
    "all beyond": {"top_k": 900, "top_p": 0.99, "min_p": 1e-4, "temperature": 2.0},
}


@pytest.fixture(params=["torch", "llvm"])
def passes(request: pytest.FixtureRequest) -> LogitKernels:
    return choices.named(request.param).logits


def dense(law: Law, vocab: int) -> np.ndarray:
    """All probabilities of each row."""
    weights = law.joined(torch.arange(len(law.ids))).double() * law.unit / law.total
    return weights[:, :vocab].numpy()


def peaked(rows: int, vocab: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    logits = torch.randn(rows, vocab) * 1.5
    logits[:, : min(vocab, 30)] += torch.linspace(9, 3, 30)[: min(vocab, 30)]
    return logits[:, torch.randperm(vocab)]


@pytest.mark.parametrize("size", [3, 256])
@pytest.mark.parametrize("vocab", [11, 1000, 20_011])
@pytest.mark.parametrize("name", FILTERS)
def test_probabilities_equal_the_definition(name: str, vocab: int, size: int, passes: LogitKernels) -> None:
    sampling = Sampling(**FILTERS[name])  # type: ignore[arg-type]
    logits = peaked(3, vocab, seed=vocab).bfloat16()
    law = process(LogitRows.of(logits, [2, 0, 1], passes), SamplingRows.of([sampling] * 3, logits.device), size)
    expected = processed(logits[[2, 0, 1]].double().numpy(), sampling)
    assert np.abs(dense(law, vocab) - expected).max() < 1e-6
    differing = (dense(law, vocab) > 0) != (expected > 1e-37)
    assert expected[differing].sum() < 1e-6  # at most tokens on a rounding edge


@pytest.mark.parametrize("extra", [{}, {"top_k": 9000}, {"min_p": 1e-9}])
@pytest.mark.parametrize("size", [1, 64, 256])
def test_a_nucleus_of_exactly_the_head_has_nothing_of_the_rest(
    size: int, extra: dict[str, float], passes: LogitKernels
) -> None:
    """`size` equal tokens with all the mass but a tenth of one of them: only together have they top_p of it."""
    logits = torch.full((1, 9001), float(np.log(0.1 / 9001)))
    logits[0, torch.randperm(9001, generator=torch.Generator().manual_seed(1))[:size]] = 0.0
    sampling = Sampling(top_p=(size - 0.5) / (size + 0.1), **extra)  # type: ignore[arg-type]
    law = process(LogitRows.of(logits, [0], passes), SamplingRows.of([sampling], logits.device), size)
    expected = processed(logits.double().numpy(), sampling)
    assert np.count_nonzero(expected) == size
    assert np.abs(dense(law, 9001) - expected).max() < 1e-6
    assert np.count_nonzero(dense(law, 9001)) == size
    assert float(law.rest[0, 0]) == 0.0


def test_mixed_rows_are_as_alone(passes: LogitKernels) -> None:
    logits = peaked(len(FILTERS), 20_000, seed=3).bfloat16()
    samplings = [Sampling(**settings) for settings in FILTERS.values()]  # type: ignore[arg-type]
    together = process(LogitRows.of(logits, range(len(logits)), passes), SamplingRows.of(samplings, logits.device), 64)
    whole = facts(together)
    for row, sampling in enumerate(samplings):
        alone = process(LogitRows.of(logits, [row], passes), SamplingRows.of([sampling], logits.device), 64)
        assert all(np.array_equal(a[row], b[0]) for a, b in zip(whole, facts(alone), strict=True)), sampling


def facts(law: Law) -> list[np.ndarray]:
    return [law.log_weights.numpy(), law.rest.numpy(), law.total.numpy(), dense(law, 20_000)]


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 300}, {"top_p": 0.999, "top_k": 290}])
def test_ties_at_the_edge_keep_the_lower_ids(settings: dict[str, float], passes: LogitKernels) -> None:
    for vocab in (400, 9000):
        logits = torch.zeros(1, vocab)
        sampling = Sampling(**settings)  # type: ignore[arg-type]
        law = process(LogitRows.of(logits, [0], passes), SamplingRows.of([sampling], logits.device), 256)
        support = np.flatnonzero(dense(law, vocab)[0])
        expected = int(np.ceil(min(sampling.top_k or vocab, vocab) * sampling.top_p))
        assert len(support) - expected in {0, 1}  # a whole sum may round to either side
        assert support.tolist() == list(range(len(support)))


def test_a_real_vocabulary_beyond_the_head(passes: LogitKernels) -> None:
    logits = peaked(2, 262_144, seed=1).bfloat16()
    for settings in ({"top_p": 0.9}, {"top_k": 5000, "top_p": 0.8, "min_p": 1e-5}, {"temperature": 0.7, "top_k": 50}):
        sampling = Sampling(**settings)  # type: ignore[arg-type]
        law = process(LogitRows.of(logits, [0, 1], passes), SamplingRows.of([sampling] * 2, logits.device), 256)
        expected = processed(logits.double().numpy(), sampling)
        assert np.abs(dense(law, 262_144) - expected).max() < 1e-6
        assert np.abs(((dense(law, 262_144) > 0) * 1.0 - (expected > 0)).sum()) <= 2
