"""How far confidences are from the truth: calibration error, ranking, reliability diagrams.

The confidence judged is prefix survival, the product of a block's confidences up to a position: what a scheduler acts
on (DSpark §3.2.2). Leaves making it right to `training.calibration`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.models.drafters.calibration import Calibration
from services.draft.confidence import Curves
from training.rounds import Rounds

__all__ = ["BINS", "Point", "PositionReport", "Report", "auc", "ece", "ece_by_chance", "prefix_survival", "reliability"]

BINS = 15


@dataclass(frozen=True, slots=True)
class Point:
    """One bin of a reliability diagram: how many rounds, their mean confidence and the share that survived."""

    rounds: int
    confidence: float
    outcome: float


@dataclass(frozen=True, slots=True)
class PositionReport:
    """Block position k over the rounds that drafted it.

    `survived`: share of rounds that accepted k tokens or more. `conditional`: the same share among rounds that accepted
    the k - 1 before it. ECE and AUC are of prefix survival, before and after calibration; `chance` is the ECE that a
    perfectly calibrated confidence would show with so many rounds. `auc_single`: of the position's own confidence among
    the rounds that reached it, which no calibration changes. None where there is nothing to tell it from.
    """

    position: int
    rounds: int
    survived: float | None
    conditional: float | None
    ece_before: float | None
    ece_after: float | None
    chance: float | None
    auc_before: float | None
    auc_after: float | None
    auc_single: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a calibration did in one setting, on rounds that it should not have been fitted on."""

    setting: str
    rounds: int
    texts: int
    tau: float
    positions: tuple[PositionReport, ...]

    @staticmethod
    def of(rounds: Rounds, calibration: Calibration) -> Report:
        """Judge a calibration by some rounds."""
        raw, ours = prefix_survival(rounds), prefix_survival(rounds, calibration)
        positions = tuple(_position(rounds, k, raw, ours) for k in range(1, rounds.block_size + 1))
        return Report(
            calibration.setting, len(rounds), int(rounds.text.bincount().count_nonzero()), rounds.tau, positions
        )

    def mean_ece(self, *, after: bool = True) -> float:
        """Mean over the positions that have rounds; NaN for none."""
        found = self._eces(after=after)
        return math.fsum(found) / len(found) if found else math.nan

    def worst_ece(self, *, after: bool = True) -> float:
        """Of the position that is worst; NaN for none."""
        return max(self._eces(after=after), default=math.nan)

    def to_json(self) -> dict[str, Any]:
        """Everything, with means and worst positions."""
        figures = {
            "mean_ece_before": self.mean_ece(after=False),
            "mean_ece_after": self.mean_ece(),
            "worst_ece_before": self.worst_ece(after=False),
            "worst_ece_after": self.worst_ece(),
        }
        return asdict(self) | {name: None if math.isnan(value) else value for name, value in figures.items()}

    def _eces(self, *, after: bool) -> list[float]:
        values = [one.ece_after if after else one.ece_before for one in self.positions]
        return [value for value in values if value is not None]


def prefix_survival(rounds: Rounds, calibration: Calibration | None = None) -> Tensor:
    """float64 (r, n): the product of confidences up to each position; raw ones without a calibration.

    `ConfigError` where the rounds have no confidences: their drafter has no confidence head.
    """
    drafted = torch.arange(rounds.block_size) < rounds.drafted[:, None]
    if bool(rounds.logits[drafted].isnan().any()):
        raise ConfigError("the rounds have no confidences: their drafter has no confidence head")
    logits = rounds.logits.double()
    if calibration is not None:
        logits = torch.from_numpy(Curves([calibration]).of(logits.numpy(), [0] * len(logits)))
    return logits.sigmoid().cumprod(-1)


def ece(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of confidence (r,) and outcome (r,), in bins of equal mass.

    Rounds of one confidence share their outcomes, so that the order of ties makes no difference. NaN for no rounds.
    """
    return (
        math.fsum(
            point.rounds * abs(point.confidence - point.outcome) for point in reliability(confidence, outcome, bins)
        )
        / len(confidence)
        if len(confidence)
        else math.nan
    )


def ece_by_chance(confidence: Tensor, bins: int = BINS) -> float:
    """About the ECE that confidences (r,) would show if every one were exactly right, rounds being independent."""
    if not len(confidence):
        return math.nan
    variance = confidence.double() * (1 - confidence.double())
    parts = variance[confidence.argsort()].tensor_split(bins)
    return sum(math.sqrt(2 / math.pi * float(part.sum())) for part in parts) / len(confidence)


def reliability(confidence: Tensor, outcome: Tensor, bins: int = BINS) -> list[Point]:
    """The points of a reliability diagram, by rising confidence: at most `bins` bins of equal mass."""
    ordered, order = confidence.double().sort()
    hit = _shared(ordered, outcome.double()[order])
    pairs = zip(ordered.tensor_split(bins), hit.tensor_split(bins), strict=True)
    return [Point(len(one), float(one.mean()), float(other.mean())) for one, other in pairs if len(one)]


def auc(confidence: Tensor, outcome: Tensor) -> float | None:
    """How often a surviving round has more confidence than another, ties counting half; None where all are alike.

    The rank formula of Mann and Whitney, with the mean rank of every tie.
    """
    survived = outcome.bool()
    hits, misses = int(survived.sum()), int((~survived).sum())
    if not hits or not misses:
        return None
    ordered, order = confidence.double().sort()
    rank = _shared(ordered, torch.arange(1, len(order) + 1, dtype=torch.float64))
    return (float(rank[survived[order]].sum()) - hits * (hits + 1) / 2) / (hits * misses)


def _shared(ordered: Tensor, values: Tensor) -> Tensor:
    """Values (r,), each replaced by the mean of all that have the same one of the `ordered` confidences."""
    place = (ordered[1:] > ordered[:-1]).long().cumsum(0)
    place = torch.cat([place.new_zeros(min(len(ordered), 1)), place])
    count = place.bincount()
    return (torch.zeros(len(count), dtype=torch.float64).index_add_(0, place, values) / count)[place]


def _position(rounds: Rounds, k: int, raw: Tensor, ours: Tensor) -> PositionReport:
    drafted, reached = rounds.drafted >= k, rounds.accepted >= k - 1
    before, after, survived = raw[drafted, k - 1], ours[drafted, k - 1], rounds.accepted[drafted] >= k
    tried = drafted & reached
    single = rounds.accepted[tried] >= k
    return PositionReport(
        position=k,
        rounds=len(survived),
        survived=_known(float(survived.double().mean())),
        conditional=_known(float(single.double().mean())),
        ece_before=_known(ece(before, survived)),
        ece_after=_known(ece(after, survived)),
        chance=_known(ece_by_chance(after)),
        auc_before=auc(before, survived),
        auc_after=auc(after, survived),
        auc_single=auc(rounds.logits[tried, k - 1], single),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
