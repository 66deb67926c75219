"""How well a drafter would do on held-out texts: 1 - TV by position, accepted length at temperature 1 and 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.models.drafters import Drafter
from training.blocks import BlockRows, arithmetic_of, block_rows, sample_anchors
from training.initialise import Standardisation
from training.states import TargetStates

__all__ = ["Validation", "validate"]


@dataclass(frozen=True, slots=True)
class Validation:
    """Figures over blocks at fixed random anchors of held-out texts; lists have one entry a block position.

    `acceptance`: mean 1 - TV. `tau`: expected tokens a round under rejection at temperature 1, token by token (a block
    as one keeps more), both over all texts. Over texts drawn at temperature 0 only: `greedy_acceptance`, how often
    token k matched where all before it did, and `greedy_tau`.
    """

    acceptance: list[float]
    tau: float
    greedy_acceptance: list[float]
    greedy_tau: float


@torch.no_grad()
def validate(
    drafter: Drafter,
    states: TargetStates,
    rows: Sequence[int],
    standardisation: Standardisation,
    *,
    anchors: int = 24,
    per_batch: int = 8,
) -> Validation:
    """Figures over the texts at `rows`, `anchors` blocks each. Leaves the drafter in training mode."""
    generator = torch.Generator().manual_seed(0)
    drafter.eval()
    parts = []
    for first in range(0, len(rows), per_batch):
        batch = states.batch(rows[first : first + per_batch])
        standardisation.apply_(batch.captured)
        places = sample_anchors(batch, anchors, generator)
        with arithmetic_of(drafter):
            found = block_rows(drafter, batch, places)
        parts.append(_figures(found, batch.temperatures))
    drafter.train()
    return _result(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _figures(rows: BlockRows, temperatures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the blocks that lie in their text as a whole: 1 - TV (b, n), prefix matches (b, n), whether greedy (b,)."""
    whole = rows.valid.all(-1)
    acceptance = torch.minimum(torch.softmax(rows.logits.float(), -1), rows.target).sum(-1)
    matches = (rows.logits.argmax(-1) == rows.labels).long().cumprod(-1)
    greedy = (temperatures == 0)[:, None].expand_as(whole)
    return acceptance[whole], matches[whole].float(), greedy[whole]


def _result(acceptance: Tensor, matches: Tensor, greedy: Tensor) -> Validation:
    matches = matches[greedy]
    survived = matches.mean(0) if len(matches) else torch.zeros(acceptance.shape[1])
    before = torch.cat([torch.ones(1, device=survived.device), survived[:-1]])
    return Validation(
        acceptance=acceptance.mean(0).tolist(),
        tau=1 + float(acceptance.cumprod(-1).sum(-1).mean()),
        greedy_acceptance=(survived / before.clamp_min(1e-9)).tolist(),
        greedy_tau=1 + float(survived.sum()),
    )
