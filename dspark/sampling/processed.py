"""The target's processed distribution: logits / temperature, top_k, top_p, min_p, renormalised.

Rows of 262k logits meet few full passes: the most likely `size` tokens are taken exactly (the head) and carry
everything in float64; all other tokens of the support (the rest) are float32 weights with one float64 sum. Filters
nearly always cut inside the head; only where they do not is a longer list sorted.

A row's results do not depend on what else is in the batch: sums are taken in an order fixed by the row alone (`sum`
over a whole row is not: it splits by batch size), and `exp2` is avoided, whose last elements of an array differ from
the others in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.sampling.order import BLOCK, padded_width, top
from dspark.sampling.rows import SamplingRows
from dspark.sampling.scratch import Scratch

__all__ = ["Law", "block_sums", "kept", "process", "scratch", "widened"]

_MAX_SCALE = (
    1e30  # keeps 1 / temperature finite in float32; differences of logits times this are 0 or -inf all the same
)
_WIDEN = 8
_SHORT = 8192

scratch = Scratch()
"""Buffers of this package; see `Law` for how long they hold."""


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
    def rest(self) -> torch.Tensor:
        """float64 (rows, 1): total weight of the rest."""
        return self.rest_sums[:, -1:] * self.unit

    @property
    def total(self) -> torch.Tensor:
        """float64 (rows, 1): total weight, what a weight is divided by to be a probability."""
        return self.log_weights.exp().cumsum(-1)[:, -1:] + self.rest

    def weights_of(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """float64 (n, 1): the weight of one token in each of some rows, both int64, ids (n, 1) and rows (n,)."""
        hit = self.ids[rows] == ids
        head = torch.where(hit, self.log_weights[rows], -torch.inf).amax(-1, keepdim=True).exp()
        return head + self.rest_weights[rows.unsqueeze(-1), ids] * self.unit[rows]

    def joined(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (n, padded vocabulary): all weights of some rows, head and rest, in units of `unit`.

        In another thread-wide buffer, free to be written to.
        """
        weights = scratch.take("joined", len(rows), self.rest_weights.shape[1], rows.device)
        torch.index_select(self.rest_weights, 0, rows, out=weights)
        return weights.scatter_(1, self.ids[rows], (self.log_weights[rows].exp() / self.unit[rows]).float())


def widened(logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """float32 (n, padded vocabulary) copy of some rows of logits in a thread-wide buffer; padding is -inf."""
    vocab = logits.shape[1]
    buffer = scratch.take("logits", len(rows), padded_width(vocab), logits.device)
    if vocab < _SHORT or logits.is_cuda:
        buffer[:, :vocab] = logits[torch.tensor(rows, device=logits.device)]
    else:  # a gathered copy would cost more in page faults than all that follows
        for into, row in zip(buffer, rows, strict=True):
            into[:vocab] = logits[row]
    buffer[:, vocab:] = -torch.inf
    return buffer


def process(logits: torch.Tensor, rows: SamplingRows, size: int) -> Law:
    """The processed distribution of each row.

    Args:
        logits: float32 (rows, width) as `widened` gives them; each row has a finite maximum.
        rows: the rows' settings.
        size: length of the head. Part of the numerics: another size gives other last bits.

    Returns:
        The laws, on thread-wide buffers.
    """
    size = min(size, logits.shape[1])
    ids, values = top(logits, size)
    maximum = values[:, :1].double()
    log_weights = (values.double() - maximum) / rows.temperature
    narrow = (rows.top_k > 0) & (rows.top_k <= size)
    rest_weights = scratch.take("weights", len(logits), logits.shape[1], logits.device)
    if rows.filtered and bool(narrow.all()):
        rest_weights.zero_()
    else:
        _softmax(logits, maximum, rows.temperature, rest_weights)
    unit = rest_weights.gather(1, ids[:, :1]).double().reciprocal()
    rest_weights.scatter_(1, ids, 0.0)
    law = Law(ids, log_weights, rest_weights, block_sums(rest_weights), unit, maximum, rows.temperature)
    if rows.filtered:
        _filter(law, logits, rows)
    return law


def _softmax(logits: torch.Tensor, maximum: torch.Tensor, temperature: torch.Tensor, out: torch.Tensor) -> None:
    torch.sub(logits, maximum.float(), out=out)
    out.mul_(temperature.reciprocal().clamp(max=_MAX_SCALE).float())
    torch.softmax(out, -1, out=out)


def block_sums(weights: torch.Tensor) -> torch.Tensor:
    """float64 (rows, blocks): running sums of float32 weights (rows, width) over blocks; the last is the total."""
    return weights.view(len(weights), -1, BLOCK).sum(-1).double().cumsum(-1)


def kept(weights: torch.Tensor, rows: SamplingRows, outside: torch.Tensor) -> torch.Tensor:
    """Which of a sorted list of weights (rows, n) the filters keep, `outside` being the weight beyond the list."""
    count = weights.shape[1]
    running = weights.cumsum(-1)
    limit = torch.where(rows.top_k > 0, rows.top_k, torch.iinfo(torch.int64).max)
    at = torch.arange(count, device=weights.device)
    listed = running.gather(1, (limit - 1).clamp(max=count - 1))
    mass = torch.where(limit <= count, listed, listed + outside)
    # A token stays while those before it have less than top_p of the mass.
    in_top_p = (running - weights < rows.top_p * mass) | (rows.top_p >= 1.0)
    return (at < limit) & in_top_p & (weights >= rows.min_p)


def _filter(law: Law, logits: torch.Tensor, rows: SamplingRows) -> None:
    size, width = law.ids.shape[1], logits.shape[1]
    stays = kept(law.log_weights.exp(), rows, law.rest)
    law.log_weights.masked_fill_(~stays, -torch.inf)
    filtered = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
    inside = filtered & (~stays[:, -1:] | (rows.top_k == size) | (size == width))
    for row in inside.flatten().nonzero().flatten().tolist():
        law.rest_weights[row].zero_()
    law.rest_sums.masked_fill_(inside, 0.0)
    law.unit.masked_fill_(inside, 1.0)  # nothing is left in other units, and nothing depends on them
    for row in (filtered & ~inside).flatten().nonzero().flatten().tolist():
        _filter_rest(law, logits, rows.at(row), row)


def _filter_rest(law: Law, logits: torch.Tensor, rows: SamplingRows, row: int) -> None:
    """Cut the rest of one row whose support reaches beyond the head."""
    size, width = law.ids.shape[1], logits.shape[1]
    total = law.total[row : row + 1]
    count, ids, stays = size, law.ids, law.log_weights[row : row + 1] > -torch.inf
    while count < width and bool(stays[0, -1]):
        count = min(width, max(_WIDEN * count, int(rows.top_k)))
        ids, values = top(logits[row : row + 1], count)
        weights = ((values.double() - law.maximum[row]) / rows.temperature).exp()
        stays = kept(weights, rows, (total - weights.cumsum(-1)[:, -1:]).clamp_(min=0.0))
    rest = law.rest_weights[row]
    left = ids[stays][size:]
    weights = rest[left]
    rest.zero_()
    rest[left] = weights
    law.rest_sums[row] = block_sums(rest.unsqueeze(0))[0]
