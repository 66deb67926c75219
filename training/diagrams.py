"""Reliability diagrams as PNG files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dspark.files import whole
from dspark.models.drafters.calibration import Calibration
from training.reliability import prefix_survival, reliability
from training.rounds import Rounds

__all__ = ["draw_reliability"]


def draw_reliability(path: Path, rounds: Rounds, calibration: Calibration) -> None:
    """One panel a block position: how many rounds survived against the confidence in it, before and after."""
    n = rounds.block_size
    figure = Figure(figsize=(3 * n, 3.4), layout="constrained")
    panels = figure.subplots(1, n, sharey=True, squeeze=False)[0]
    survivals = {"before": prefix_survival(rounds), "after": prefix_survival(rounds, calibration)}
    for k, axes in enumerate(panels):
        rows = rounds.drafted > k
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for name, survival in survivals.items():
            points = reliability(survival[rows, k], rounds.accepted[rows] > k)
            axes.plot([p.confidence for p in points], [p.outcome for p in points], marker=".", label=name)
        axes.set(title=f"{k + 1} accepted", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    panels[0].set_ylabel("share of rounds")
    panels[0].legend()
    figure.suptitle(calibration.setting)
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
