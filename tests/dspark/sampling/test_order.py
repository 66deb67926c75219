"""The most likely tokens in exact order."""

import numpy as np
import pytest
import torch

from dspark.sampling.order import LogitRows, best_first, padded_width, top


def expected(values: torch.Tensor, count: int) -> list[int]:
    row = values.float().numpy()
    return [int(i) for i in np.lexsort((np.arange(len(row)), -row))[:count]]


@pytest.mark.parametrize("vocab", [5, 64, 1000, 5000, 20_000])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_top_orders_ties_by_id(vocab: int, count: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.cat(
        (
            torch.randn(3, vocab),
            torch.randint(-2, 2, (3, vocab)).float(),  # many ties, zeros among them
            torch.zeros(1, vocab),
            -torch.rand(1, vocab) * 100,
            torch.where(torch.rand(1, vocab) < 0.5, -torch.inf, torch.randn(1, vocab)),
        )
    ).bfloat16()
    rows = LogitRows.of(logits, range(len(logits)))
    count = min(count, vocab)
    ids, values = top(rows, count)
    for row, logit in enumerate(logits):
        assert ids[row].tolist() == expected(logit, count)
        assert torch.equal(values[row], logit.float()[ids[row]])


def test_negative_zero_ties_with_zero() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0]])
    assert top(LogitRows.of(logits, [0]), 3)[0].tolist() == [[1, 2, 3]]
    assert best_first(torch.tensor([0.0, -0.0, 2.0]), torch.tensor([9, 3, 4])).tolist() == [2, 1, 0]


def test_rows_are_chosen_padded_and_judged_sound() -> None:
    logits = torch.zeros(4, 10_000)
    logits[1, 3], logits[2, 4], logits[3] = torch.nan, torch.inf, -torch.inf
    rows = LogitRows.of(logits, [0, 1, 2, 3, 0])
    assert rows.values.shape == (5, padded_width(10_000)) == (5, 10_048)
    assert rows.sound.tolist() == [True, False, False, False, True]
    rows.mend(rows.sound)
    assert rows.sound.all()
    assert rows.at(3).values.shape == (1, 10_048)


def test_negative_nan_is_unsound_too() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 5] = -torch.nan
    assert not LogitRows.of(logits, [0]).sound
