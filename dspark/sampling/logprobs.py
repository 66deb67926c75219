"""Log-probabilities of emitted tokens under the processed target distribution.

At temperature 0 that distribution is a point mass and would say nothing; reported is then the model's own
distribution: temperature 1, no filters.
"""

from __future__ import annotations

import torch

from dspark.messages import PositionLogprobs, TokenLogprob
from dspark.sampling.order import LogitRows, top
from dspark.sampling.processed import Law

__all__ = ["logprobs"]


def logprobs(law: Law, logits: LogitRows, row: int, token: int, count: int) -> PositionLogprobs:
    """The chosen token and the `count` most likely ones (fewer where the support is smaller) of one row.

    Args:
        law: laws of the rows; as they were made.
        logits: what the laws were made from.
        row: which row.
        token: the chosen token.
        count: how many alternatives.
    """
    log_total = law.total[row].log()
    ids, log_weights = law.ids[row, :count], law.log_weights[row, :count]
    if count > law.ids.shape[1]:
        ids, log_weights = _beyond_head(law, logits, row, count)
    values = (log_weights - log_total).tolist()
    best = tuple(TokenLogprob(i, v) for i, v in zip(ids.tolist(), values, strict=True) if v > -torch.inf)
    chosen = (logits.values[row, token].double() - law.maximum[row]) / law.temperature[row] - log_total
    return PositionLogprobs(TokenLogprob(token, float(chosen)), best)


def _beyond_head(law: Law, logits: LogitRows, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` most likely tokens and their log weights where the head has fewer."""
    ids = top(logits.at(row), min(count, logits.values.shape[1]))[0][0]
    log_weights = (logits.values[row, ids].double() - law.maximum[row]) / law.temperature[row]
    size = law.ids.shape[1]
    log_weights[:size] = law.log_weights[row]
    log_weights[size:].masked_fill_(law.rest_weights[row, ids[size:]] == 0.0, -torch.inf)
    return ids, log_weights
