"""The target's processed distribution: logits / temperature, top_k, top_p, min_p, renormalised.

Rows of 262k logits meet few full passes: the most likely `size` tokens are taken exactly (the head) and carry
everything in float64; all other tokens of the support (the rest) are float32 weights with one float64 sum. Filters
nearly always cut inside the head; `dspark.sampling.cut` does it where they do not.

A row's results do not depend on what else is in the batch: sums are taken in an order fixed by the row alone (`sum`
over a whole row is not: it splits by batch size), and `exp2` is avoided, whose last elements of an array differ from
the others in the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.kernels.logits import block_sums
from dspark.sampling.cut import Limit, cut
from dspark.sampling.order import LogitRows, top
from dspark.sampling.rows import SamplingRows
from dspark.sampling.scratch import scratch

__all__ = ["Law", "kept", "process"]

_SORTED = 4096  # rows up to this width are filtered by sorting them whole


@dataclass(eq=False)
class Law:
    """Processed distributions of some rows, as weights relative to each row's most likely token, whose weight is 1.

    Holds thread-wide buffers: use it up before the next `process` on the same thread.
    """

    ids: torch.Tensor
    """int64 (rows, size): the head, most likely first."""
    log_weights: torch.Tensor
    """float64 (rows, size): log weights of the head, -inf outside the support."""
    rest_weights: torch.Tensor
    """float32 (rows, padded vocabulary): weights of the rest in units of `unit`; 0 for head and outside the support."""
    rest_sums: torch.Tensor
    """float64 (rows, blocks): running sums of `rest_weights` over blocks."""
    unit: torch.Tensor
    """float64 (rows, 1): weight of 1.0 in `rest_weights`."""
    maximum: torch.Tensor
    """float64 (rows, 1): the greatest logit."""
    temperature: torch.Tensor
    """float64 (rows, 1)."""

    @property
    def head(self) -> torch.Tensor:
        """float64 (rows, 1): total weight of the head."""
        return self.log_weights.exp().cumsum(-1)[:, -1:]

    @property
    def rest(self) -> torch.Tensor:
        """float64 (rows, 1): total weight of the rest."""
        return self.rest_sums[:, -1:] * self.unit

    @property
    def total(self) -> torch.Tensor:
        """float64 (rows, 1): total weight, what a weight is divided by to be a probability."""
        return self.head + self.rest

    def weights_of(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """float64 (n, k): weights of some tokens in each of some rows, both int64, ids (n, k) and rows (n,)."""
        hit = self.ids[rows, None] == ids[..., None]
        head = torch.where(hit, self.log_weights[rows, None], -torch.inf).amax(-1).exp()
        return head + self.rest_weights[rows.unsqueeze(-1), ids] * self.unit[rows]

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (n, padded vocabulary): all weights of some rows, head and rest, in units of `unit`.

        In another thread-wide buffer, free to be written to.
        """
        weights = scratch.take("joined", len(rows), self.rest_weights.shape[1], rows.device)
        torch.index_select(self.rest_weights, 0, rows, out=weights)
        return weights.scatter_(1, self.ids[rows], (self.log_weights[rows].exp() / self.unit[rows]).float())


def process(logits: LogitRows, rows: SamplingRows, size: int) -> Law:
    """The processed distribution of each row.

    Args:
        logits: sound rows.
        rows: the rows' settings.
        size: length of the head. Part of the numerics: another size gives other last bits.

    Returns:
        The laws, on thread-wide buffers.
    """
    width = logits.values.shape[1]
    size = min(size, width)
    ids, values = top(logits, size)
    maximum = values[:, :1].double()
    log_weights = (values.double() - maximum) / rows.temperature
    rest_weights = scratch.take("weights", len(ids), width, ids.device)
    if width > _SORTED and bool(((rows.top_k > 0) & (rows.top_k <= size)).all()):
        unit, sums = torch.ones_like(maximum), block_sums(rest_weights.zero_())
    else:
        unit, sums = logits.passes.weigh(logits.values, ids, rows.temperature, rest_weights)
    law = Law(ids, log_weights, rest_weights, sums, unit, maximum, rows.temperature)
    if rows.filtered and width <= _SORTED:
        _filter_sorted(law, logits, rows)
    elif rows.filtered:
        _filter(law, logits, rows)
    return law


def kept(weights: torch.Tensor, rows: SamplingRows, outside: torch.Tensor) -> torch.Tensor:
    """Which of a sorted list of weights the filters keep.

    Args:
        weights: float64 (rows, n), the n greatest in descending order, relative to the first.
        rows: the rows' settings.
        outside: float64 (rows, 1), the weight of all that are not listed; not needed where top_k <= n.

    Returns:
        bool (rows, n). Where the last is kept and top_k > n, tokens beyond the list may be too.
    """
    count = weights.shape[1]
    running = weights.cumsum(-1)
    limit = torch.where(rows.top_k > 0, rows.top_k, torch.iinfo(torch.int64).max)
    listed = running.gather(1, (limit - 1).clamp(max=count - 1))
    mass = torch.where(limit <= count, listed, listed + outside)
    # A token stays while those before it have less than top_p of the mass.
    in_top_p = (running - weights < rows.top_p * mass) | (rows.top_p >= 1.0)
    return (torch.arange(count, device=weights.device) < limit) & in_top_p & (weights >= rows.min_p)


def _filter_sorted(law: Law, logits: LogitRows, rows: SamplingRows) -> None:
    size, width = law.ids.shape[1], logits.values.shape[1]
    ids, values = top(logits, width)
    weights = ((values.double() - law.maximum) / law.temperature).exp()
    stays = kept(weights, rows, torch.zeros_like(law.unit))
    law.log_weights.masked_fill_(~stays[:, :size], -torch.inf)
    rest = law.rest_weights.gather(1, ids).masked_fill_(~stays, 0.0)
    law.rest_weights.scatter_(1, ids, rest)
    law.rest_sums.copy_(block_sums(law.rest_weights))


def _filter(law: Law, logits: LogitRows, rows: SamplingRows) -> None:
    size = law.ids.shape[1]
    for row in _where((rows.top_k > size) & (rows.top_k < logits.values.shape[1])):
        _cut_rest(law, logits, row, Limit(tokens=int(rows.top_k[row]) - size))
    stays = kept(law.log_weights.exp(), rows, law.rest)
    missing = rows.top_p * law.total - law.head  # of what top_p asks for, once the head is used up
    law.log_weights.masked_fill_(~stays, -torch.inf)
    filtered = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
    full = (rows.top_p < 1.0) & (missing <= 0.0)  # the head is the whole nucleus, its last token included
    inside = filtered & (~stays[:, -1:] | (rows.top_k == size) | full)
    for row in _where(inside):
        law.rest_weights[row].zero_()
    law.rest_sums.masked_fill_(inside, 0.0)
    law.unit.masked_fill_(inside, 1.0)  # nothing is left in other units, and nothing depends on them
    for row in _where(~inside & (rows.top_p < 1.0)):
        _cut_rest(law, logits, row, Limit(mass=float(missing[row] / law.unit[row])))
    for row in _where(~inside & (rows.min_p > 0.0)):
        _cut_rest(law, logits, row, Limit(least=float(rows.min_p[row] / law.unit[row])))


def _where(mask: torch.Tensor) -> list[int]:
    """Rows in which a mask (rows, 1) is set."""
    return [row for row, marked in enumerate(mask.flatten().tolist()) if marked]


def _cut_rest(law: Law, logits: LogitRows, row: int, limit: Limit) -> None:
    cut(law.rest_weights[row], logits.values[row], limit)
    law.rest_sums[row] = block_sums(law.rest_weights[row : row + 1])[0]
