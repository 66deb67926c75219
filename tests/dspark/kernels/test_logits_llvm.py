"""Compiled passes over logits: what torch's give, rows the same in any company, and laws that are right."""

import pytest
import torch
from support.paged import randn

from dspark.kernels import logits as plain
from dspark.kernels import team
from dspark.kernels.logits import BLOCK
from dspark.messages import Sampling
from dspark.sampling.order import LogitRows
from dspark.sampling.processed import process
from dspark.sampling.rows import SamplingRows

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

from dspark.kernels import logits_llvm
from dspark.kernels.logits_llvm import LLVM_LOGITS

WIDTHS = (BLOCK, 640, 64 * BLOCK, 64 * BLOCK + BLOCK, 151_936)
TEMPERATURES = (1.0, 0.3, 5.0, 1e-6, 1e-32, 1e30)


@pytest.mark.parametrize("width", WIDTHS)
def test_gather_copies_rows_and_finds_block_maxima(width: int) -> None:
    logits, rows = randn(5, width), [3, 0, 0, 4]
    logits[3, 1], logits[0, -1], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[0, BLOCK // 2] = torch.nan  # not the last of its block: a maximum must keep it
    values, expected = (torch.full((len(rows), width), torch.nan) for _ in range(2))
    maxima, plain_maxima = logits_llvm.gather(logits, rows, values), plain.gather(logits, rows, expected)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(maxima, plain_maxima, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_whole_blocks_of_float32_is_gathered_by_torch() -> None:
    for logits in (randn(2, 100), randn(2, 128).bfloat16(), randn(2, 256)[:, ::2]):
        values = torch.full((1, 128), torch.nan)
        maxima = logits_llvm.gather(logits, [1], values)
        assert torch.equal(values[0, : logits.shape[1]], logits[1].float())
        assert torch.equal(maxima, values.view(1, -1, BLOCK).amax(-1))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_weights_are_what_torch_gives_but_for_rounding(width: int, temperature: float) -> None:
    values = randn(3, width) * 8
    values[1, width // 2 :] = -torch.inf
    ids = values.topk(min(17, width)).indices
    at = torch.full((3, 1), temperature, dtype=torch.float64)
    weights, expected = (torch.full_like(values, torch.nan) for _ in range(2))
    unit, sums = logits_llvm.weigh(values, ids, at, weights)
    plain_unit, plain_sums = plain.weigh(values, ids, at, expected)
    assert not weights.gather(1, ids).any()
    torch.testing.assert_close(weights * unit, expected * plain_unit, rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(sums * unit, plain_sums * plain_unit, rtol=2e-5, atol=1e-30)


def test_rows_keep_their_bits() -> None:
    values = randn(7, 64 * BLOCK + BLOCK) * 5
    ids, at = values.topk(32).indices, torch.linspace(0.2, 3, 7, dtype=torch.float64).unsqueeze(-1)
    whole = torch.empty_like(values)
    _, sums = logits_llvm.weigh(values, ids, at, whole)
    for row in range(7):
        part = slice(row, row + 1)
        alone = torch.empty_like(values[part])
        assert torch.equal(logits_llvm.weigh(values[part], ids[part], at[part], alone)[1], sums[part])
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.999), Sampling(min_p=1e-4)], ids=str
)
def test_laws_are_right(sampling: Sampling) -> None:
    logits = randn(2, 64 * BLOCK + BLOCK) * 3
    law = process(LogitRows.of(logits, [1, 0], LLVM_LOGITS), SamplingRows.of([sampling] * 2, logits.device), 64)
    found = law.rest_weights.double() * law.unit
    found = found.scatter(1, law.ids, law.log_weights.exp()) / law.total
    exact = (logits[[1, 0]].double() / sampling.temperature).softmax(-1)
    order = exact.argsort(descending=True)
    ranked = exact.gather(1, order)
    stays = (ranked.cumsum(-1) - ranked < sampling.top_p) & (ranked >= sampling.min_p * ranked[:, :1])
    exact = torch.zeros_like(exact).scatter(1, order, torch.where(stays, ranked, 0.0))
    exact /= exact.sum(-1, keepdim=True)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-12)
