"""Draws what `dspark train report` found, in the manner of the paper's figures: SVG files, one a question.

Knows report rows and training logs; matplotlib comes with the `train` extra and loads when something is drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError
from training.report import Row

__all__ = ["draw", "read_log"]

_COLOURS = ("#1f4e79", "#c8553d", "#6a994e", "#8d6a9f", "#d9a441", "#5b8e9c", "#7d7d7d", "#a4243b")
_MARKERS = "osD^vPX*"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dspark",
}
_SWEPT = re.compile(r"^(.*?)([A-Za-z]+)=(\d+)$")


def draw(rows: Sequence[Row], logs: Mapping[str, Sequence[Mapping[str, Any]]], directory: Path) -> list[Path]:
    """Write the figures that rows and logs are enough for; the files.

    `logs`: validations of training runs by name, as `read_log` gives them. Of each setting there are: accepted length
    by data set and drafter, acceptance by position, threshold sweep, and, for drafters named like `depth=2`, accepted
    length over that number. `ConfigError` without matplotlib, or for a directory that cannot be written.
    """
    figure = _Figures(directory)
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        figure.save(f"tau-{setting}", _bars, own)
        figure.save(f"acceptance-{setting}", _positions, own)
        if any(row.sweep for row in own):
            figure.save(f"threshold-{setting}", _thresholds, own)
        for name in dict.fromkeys(match[2] for row in own if (match := _SWEPT.match(row.drafter))):
            figure.save(f"{name}-{setting}", _over, own, name)
    if logs:
        figure.save("training", _curves, logs)
    return figure.written


def read_log(run: Path) -> list[dict[str, Any]]:
    """The validations in a training run's log.jsonl; `ConfigError` where it has none."""
    path = run / "log.jsonl" if run.is_dir() else run
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no training log: {error}") from error
    validations = [record for record in records if isinstance(record, dict) and record.get("event") == "validation"]
    if not validations:
        raise ConfigError(f"{path} holds no validation")
    return validations


class _Figures:
    """matplotlib and where its figures go."""

    def __init__(self, directory: Path) -> None:
        try:
            import matplotlib as mpl  # noqa: PLC0415  # an extra
            from matplotlib import pyplot as plt  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError("figures need matplotlib: install the `train` extra (pip install '.[train]')") from error
        plt.switch_backend("svg")
        self.plt: Any = plt
        self.written: list[Path] = []
        self._style = mpl.rc_context
        self._directory = directory

    def save(self, name: str, make: Callable[..., Any], *what: Any) -> None:
        """Draw with `make(pyplot, *what)` and write `name`.svg."""
        path = self._directory / f"{name}.svg"
        with self._style(_STYLE):  # type: ignore[arg-type]
            figure = make(self.plt, *what)
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            except OSError as error:
                raise ConfigError(f"cannot write {path}: {error.strerror}") from error
            finally:
                self.plt.close(figure)
        self.written.append(path)


def _bars(plt: Any, rows: Sequence[Row]) -> Any:
    """Accepted length: groups of bars, one group a data set."""
    data, drafters = _names(rows)
    figure, axes = plt.subplots(figsize=(1.6 + 1.1 * len(data) + 0.25 * len(data) * len(drafters), 2.6))
    width = 0.8 / len(drafters)
    for place, drafter in enumerate(drafters):
        known = [(at, _of(rows, name, drafter)) for at, name in enumerate(data)]
        at = [x - 0.4 + width * (place + 0.5) for x, row in known if row]
        heights = [row.tau for _, row in known if row]
        bars = axes.bar(at, heights, width * 0.92, label=drafter, color=_colour(place))
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(data)), data)
    axes.set_ylim(bottom=1.0, top=max(1.1, 1 + 1.12 * (max(row.tau for row in rows) - 1)))
    axes.set_ylabel("accepted length τ")
    axes.grid(visible=False, axis="x")
    _legend(axes, len(drafters))
    return figure


def _positions(plt: Any, rows: Sequence[Row]) -> Any:
    """Conditional acceptance over block positions: a panel a data set, a line a drafter."""
    data, drafters = _names(rows)
    figure, panels = _panels(plt, data)
    for axes, name in zip(panels, data, strict=True):
        for place, drafter in enumerate(drafters):
            if row := _of(rows, name, drafter):
                shares = row.conditional_acceptance
                axes.plot(range(1, len(shares) + 1), shares, **_line(place), label=drafter)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("position in block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, 1)
    panels[0].set_ylabel("conditional acceptance")
    _legend(panels[-1], len(drafters))
    return figure


def _thresholds(plt: Any, rows: Sequence[Row]) -> Any:
    """Acceptance among verified drafts above, and accepted length below, over the confidence threshold."""
    data, drafters = _names([row for row in rows if row.sweep])
    figure, panels = plt.subplots(2, len(data), figsize=(2.3 * len(data) + 0.8, 3.8), sharex=True, squeeze=False)
    for column, name in enumerate(data):
        for place, drafter in enumerate(drafters):
            if row := _of(rows, name, drafter):
                x = [point.threshold for point in row.sweep]
                panels[0, column].plot(x, [p.acceptance for p in row.sweep], **_line(place), label=drafter)
                panels[1, column].plot(x, [p.tau for p in row.sweep], **_line(place), label=drafter)
        panels[0, column].set_title(name, fontsize=9)
        panels[0, column].set_ylim(0, 1)
        panels[1, column].set_ylim(bottom=1)
        panels[1, column].set_xlabel("threshold on prefix survival")
    panels[0, 0].set_ylabel("acceptance rate")
    panels[1, 0].set_ylabel("accepted length τ")
    _legend(panels[0, -1], len(drafters))
    figure.tight_layout()
    return figure


def _over(plt: Any, rows: Sequence[Row], name: str) -> Any:
    """Accepted length over the number in names like `depth=2`; what stands before it in the name is a line's style."""
    named = [(match, row) for row in rows if (match := _SWEPT.match(row.drafter)) and match[2] == name]
    figure, axes = plt.subplots(figsize=(3.4, 2.6))
    for place, line in enumerate(dict.fromkeys((match[1], row.data) for match, row in named)):
        points = sorted((int(match[3]), row.tau) for match, row in named if (match[1], row.data) == line)
        label = " ".join(part.strip(" -_,") for part in line if part.strip(" -_,"))
        axes.plot(*zip(*points, strict=True), **_line(place), label=label)
    axes.set_xticks(sorted({int(match[3]) for match, _ in named}))
    axes.set_xlabel(name)
    axes.set_ylabel("accepted length τ")
    _legend(axes, 2)
    return figure


def _curves(plt: Any, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Accepted length on held-out texts over training steps."""
    figure, axes = plt.subplots(figsize=(3.8, 2.6))
    for place, (name, validations) in enumerate(logs.items()):
        points = [(one["step"], one["tau"]) for one in validations if "step" in one and "tau" in one]
        style = _line(place) | {"marker": "" if len(points) > 12 else _MARKERS[place % len(_MARKERS)]}
        if points:
            axes.plot(*zip(*points, strict=True), **style, label=name)
    axes.set_xlabel("training step")
    axes.set_ylabel("held-out τ at temperature 1")
    axes.set_ylim(bottom=1)
    _legend(axes, 2)
    return figure


def _panels(plt: Any, data: Sequence[str]) -> tuple[Any, Sequence[Any]]:
    """A row of panels that share their vertical axis."""
    figure, panels = plt.subplots(1, len(data), figsize=(2.3 * len(data) + 0.8, 2.4), sharey=True, squeeze=False)
    return figure, list(panels[0])


def _names(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(row.data for row in rows)), list(dict.fromkeys(row.drafter for row in rows))


def _of(rows: Sequence[Row], data: str, drafter: str) -> Row | None:
    found = next((row for row in rows if (row.data, row.drafter) == (data, drafter)), None)
    return None if found is None or math.isnan(found.tau) else found


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _line(place: int) -> dict[str, Any]:
    return {"color": _colour(place), "marker": _MARKERS[place % len(_MARKERS)], "clip_on": False}


def _legend(axes: Any, entries: int) -> None:
    """Beside the panel, so that it covers no data."""
    if entries > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
