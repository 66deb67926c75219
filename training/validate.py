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
        self.values = torch.zeros(3 * block + 4, dtype=torch.float64)
        views = torch.split(self.values, [block, block, block, 1, 1, 1, 1])
        self.acceptance, self.looked_at, self.accepted, self.blocks, self.survival, self.rounds, self.tokens = views

    def add(self, rows: BlockRows, batch: Batch, anchors: Tensor, real: Tensor) -> None:
        """Count the blocks at `anchors` (s, a) that are `real` (s, a)."""
        probabilities = torch.softmax(rows.logits.float(), -1)
        acceptance = torch.minimum(probabilities, rows.target).sum(-1)
        whole = real & rows.valid.all(-1)
        self.acceptance += acceptance[whole].sum(0)
        self.survival += acceptance[whole].cumprod(-1).sum()
        self.blocks += whole.sum()
        matches = (rows.logits.argmax(-1) == rows.labels) & rows.valid
        for row in range(len(anchors)):
            if batch.temperatures[row] == 0:
                self._decode(matches[row], whole[row])

    def _decode(self, matches: Tensor, whole: Tensor) -> None:
        """Walk one sequence as decoding would: each round starts one past the last accepted token."""
        block, at, count = matches.shape[1], 0, int(whole.sum())
        lengths = matches.long().cumprod(-1).sum(-1).tolist()
        while at < count:
            accepted = lengths[at]
            self.looked_at[: min(accepted + 1, block)] += 1
            self.accepted[:accepted] += 1
            self.rounds += 1
            self.tokens += accepted + 1
            at += accepted + 1

    def result(self) -> Validation:
        """The figures; 0 where nothing was counted, 1 for what begins at 1."""
        blocks = self.blocks.clamp_min(1)
        return Validation(
            acceptance=(self.acceptance / blocks).tolist(),
            tau=1 + float(self.survival / blocks),
            greedy_acceptance=(self.accepted / self.looked_at.clamp_min(1)).tolist(),
            greedy_tau=float(self.tokens / self.rounds.clamp_min(1)),
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
