"""How well a drafter would do on held-out sequences: 1 - TV by position, and accepted length at temperature 1 and 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.models.drafters import DSparkDrafter
from training.blocks import BlockRows, block_rows, every_anchor
from training.features import Batch, Sequences, gather


@dataclass(frozen=True, slots=True)
class Validation:
    """Figures over held-out sequences; lists have one entry a block position.

    `acceptance`: mean 1 - TV. `tau`: expected tokens a round under rejection sampling at temperature 1, over all
    anchors. `greedy_tau`: tokens a round of decoding at temperature 0 on sequences drawn at temperature 0, and
    `greedy_acceptance`: how often token k matched where all before it did.
    """

    acceptance: list[float]
    tau: float
    greedy_acceptance: list[float]
    greedy_tau: float


class Tally:
    """Sums that become a `Validation`; `values` may be added up over processes in between."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.values = torch.zeros(4 * block + 4, dtype=torch.float64)

    def add(self, rows: BlockRows, batch: Batch, anchors: Tensor, real: Tensor) -> None:
        """Count the blocks at `anchors` (s, a) that are `real` (s, a)."""
        n = self.block
        probabilities = torch.softmax(rows.logits.float(), -1)
        acceptance = torch.minimum(probabilities, rows.target).sum(-1)
        whole = real & rows.valid.all(-1)
        survival = acceptance.cumprod(-1)
        self.values[:n] += acceptance[whole].sum(0)
        self.values[n] += whole.sum()
        self.values[n + 1] += survival[whole].sum()
        matches = (rows.logits.argmax(-1) == rows.labels) & rows.valid
        for row in range(len(anchors)):
            if batch.temperatures[row] == 0:
                self._walk(matches[row], rows.valid[row], int(real[row].sum()))

    def _walk(self, matches: Tensor, valid: Tensor, count: int) -> None:
        """Decode one sequence: each round starts one past the last accepted token."""
        n, at = self.block, 0
        lengths = matches.long().cumprod(-1).sum(-1).tolist()
        verified = valid.sum(-1).tolist()
        while at < count and verified[at] == n:
            accepted = lengths[at]
            self.values[2 * n + 2 : 2 * n + 2 + min(accepted + 1, n)] += 1  # drafts that were looked at
            self.values[3 * n + 2 : 3 * n + 2 + accepted] += 1
            self.values[n + 2] += 1
            self.values[n + 3] += accepted + 1
            at += accepted + 1

    def result(self) -> Validation:
        """The figures; 0 where nothing was counted."""
        n, values = self.block, self.values
        blocks, rounds = values[n].clamp_min(1), values[n + 2].clamp_min(1)
        looked_at = values[2 * n + 2 : 3 * n + 2].clamp_min(1)
        return Validation(
            acceptance=(values[:n] / blocks).tolist(),
            tau=1 + float(values[n + 1] / blocks),
            greedy_acceptance=(values[3 * n + 2 : 4 * n + 2] / looked_at).tolist(),
            greedy_tau=float(values[n + 3] / rounds),
        )


@torch.no_grad()
def tally(drafter: DSparkDrafter, sequences: Sequences, *, per_batch: int = 4) -> Tally:
    """Every anchor of every sequence."""
    counts = Tally(drafter.config.block_size)
    for first in range(0, len(sequences), per_batch):
        batch = gather(sequences, torch.arange(first, min(first + per_batch, len(sequences))))
        anchors, real = every_anchor(batch)
        with torch.autocast("cpu", torch.bfloat16):
            counts.add(block_rows(drafter, batch, anchors), batch, anchors, real)
    return counts
