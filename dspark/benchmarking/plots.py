"""The summary as three SVG pictures. The one place here that needs matplotlib, imported when it draws.

`throughput.svg`: tokens a second of all users against concurrency. `speed.svg`: against the speed of one (DSpark's
Figure 7). `verify-length.svg`: drafts verified a request and round against concurrency (its Figure 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dspark.benchmarking.summary import Row
from dspark.errors import ConfigError

__all__ = ["check_plots", "draw"]

_PICTURES = {
    "throughput": ("concurrency", "tokens_per_second", "concurrent requests", "tokens/s, all together"),
    "speed": ("speed_p50", "tokens_per_second", "tokens/s a user, median", "tokens/s, all together"),
    "verify-length": ("concurrency", "verify_length", "concurrent requests", "drafts verified a request and round"),
}
"""Name: what is drawn along and what upwards, and the axes' titles."""


def check_plots(directory: Path) -> None:
    """`ConfigError` where nothing could be drawn, said before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plots needs matplotlib: pip install '.[train]'")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots {directory}: {error.strerror or error}") from error


def draw(directory: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes the pictures and returns where they are; a point that was not measured is left out."""
    try:
        return [_draw(directory / f"{name}.svg", rows, *axes) for name, axes in _PICTURES.items()]
    except OSError as error:
        raise ConfigError(f"--plots {directory}: {error.strerror or error}") from error


def _draw(path: Path, rows: Sequence[Row], along: str, upwards: str, x_title: str, y_title: str) -> Path:
    from matplotlib.figure import Figure  # noqa: PLC0415 - only pictures need it

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(row.policy for row in rows):
        _curve(axes, [row for row in rows if row.policy == policy], along, upwards)
    if along == "concurrency":
        _powers_of_two(axes, sorted({row.concurrency for row in rows}))
    else:
        axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x_title, ylabel=y_title)
    axes.grid(visible=True, linewidth=0.3)
    if rows:
        axes.legend()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="svg")
    partial.replace(path)
    return path


def _curve(axes: Any, rows: Sequence[Row], along: str, upwards: str) -> None:
    """One policy; where concurrency is not an axis, it stands beside each point."""
    values = [(_value(row, along), _value(row, upwards), row.concurrency) for row in rows]
    points = [(x, y, c) for x, y, c in values if x is not None and y is not None]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", markersize=4, label=rows[0].policy)
    if along != "concurrency":
        for x, y, concurrency in points:
            axes.annotate(str(concurrency), (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small")


def _value(row: Row, name: str) -> float | None:
    return row.concurrency if name == "concurrency" else row.medians[name]


def _powers_of_two(axes: Any, concurrencies: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(concurrencies, [str(concurrency) for concurrency in concurrencies])
    axes.minorticks_off()
