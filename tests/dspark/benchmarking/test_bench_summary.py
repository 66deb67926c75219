"""Medians, paired ratios, curves at equal throughput, and the reports made of them."""

import json
import sys
from pathlib import Path

import pytest
from support.benchmarks import measured

from dspark.benchmarking import plots
from dspark.benchmarking.plan import Plan
from dspark.benchmarking.report import baseline_of, machine, report, write_json
from dspark.benchmarking.session import Session
from dspark.benchmarking.summary import matched, same_outputs, speed_at, summarise
from dspark.errors import ConfigError

PLAN = Plan(("none", "fixed:1"), (1,))


def test_ratios_are_taken_within_a_repeat_and_then_their_median() -> None:
    # The machine slows down to a third: ratios of medians would say 40/20, and the neighbours say 1.5.
    cells = [measured("none", r, base) for r, base in enumerate((40.0, 20.0, 10.0))]
    cells += [measured("fixed:1", r, base) for r, base in enumerate((40.0, 30.0, 20.0))]
    base, ours = summarise(cells, PLAN)
    assert ours.medians["tokens_per_second"] == 30.0
    ratio = ours.ratios["tokens_per_second"]
    assert (ratio.values, ratio.median, ratio.low, ratio.high) == ((1.0, 1.5, 2.0), 1.5, 1.0, 2.0)
    assert set(base.ratios["tokens_per_second"].values) == {1.0}
    assert (ours.repeats, ours.requests) == (3, 6)


def test_repeats_without_a_partner_or_a_figure_give_no_ratio() -> None:
    cells = [measured("none", 0, 10.0), measured("fixed:1", 0, None), measured("fixed:1", 1, 30.0)]
    _, ours = summarise(cells, PLAN)
    assert "tokens_per_second" not in ours.ratios
    assert ours.medians["tokens_per_second"] == 30.0
    assert ours.medians["tau"] is None
    empty = summarise([measured("none", 0, None)], PLAN)
    assert [row.policy for row in empty] == ["none"]  # the other was never measured
    assert empty[0].medians["tokens_per_second"] is None
    assert summarise([], PLAN) == []
    assert matched(empty, "none") == matched([], "none") == []


def test_the_reference_is_none_or_the_first() -> None:
    assert Plan(("fixed:1", "none"), (1,)).reference == "none"
    assert Plan(("fixed:3", "adaptive"), (1,)).reference == "fixed:3"
    assert baseline_of(Plan(("none", "fixed:1"), (1,))) == "fixed:1"
    assert baseline_of(Plan(("none", "fixed:3"), (1,))) == "none"


@pytest.mark.parametrize(
    ("throughput", "speed"),
    [(10.0, 10.0), (15.0, 9.0), (20.0, 8.0), (30.0, 6.0), (9.9, None), (30.1, None)],
)
def test_a_curve_is_straight_between_its_points_and_ends_with_them(throughput: float, speed: float | None) -> None:
    assert speed_at([(10.0, 10.0), (20.0, 8.0), (30.0, 6.0)], throughput) == speed


def test_where_a_curve_comes_back_its_faster_branch_counts() -> None:
    back = [(10.0, 10.0), (30.0, 6.0), (20.0, 2.0)]
    assert speed_at(back, 20.0) == 8.0
    assert speed_at(back, 25.0) == 7.0
    assert speed_at([(10.0, 4.0)], 10.0) == 4.0
    assert speed_at([], 10.0) is None


def test_speeds_are_compared_where_the_baseline_serves_as_much() -> None:
    plan = Plan(("fixed:1", "adaptive"), (1, 4, 16))
    cells = [measured("fixed:1", 0, x, y, concurrency=c) for c, x, y in ((1, 10, 10), (4, 30, 8), (16, 60, 4))]
    cells += [measured("adaptive", 0, x, y, concurrency=c) for c, x, y in ((1, 20, 20), (4, 40, 10), (16, 50, 3))]
    low, middle, high = matched(summarise(cells, plan), "fixed:1")
    assert (low.relative("adaptive"), low.relative("fixed:1")) == (None, 1.0)
    assert middle.speeds["adaptive"] == 15.0
    assert middle.relative("adaptive") == 15 / 8
    assert high.relative("adaptive") is None


def test_same_outputs_counts_what_can_be_compared() -> None:
    cells = [
        measured("none", 0, 1.0, outcomes=(1, 2, 3)),
        measured("fixed:1", 0, 1.0, outcomes=(1, 7, None)),
        measured("fixed:1", 1, 1.0, outcomes=(1, 2, 3)),  # nothing to compare with
    ]
    assert same_outputs(cells, "none") == (2, 1)
    assert same_outputs([], "none") == (0, 0)


def test_the_report_is_json_and_written_whole(tmp_path: Path) -> None:
    session = Session(PLAN, ["a"])
    session.measured += [measured("none", 0, 10.0, outcomes=(1,)), measured("fixed:1", 0, None, outcomes=(1,))]
    path = tmp_path / "report.json"
    write_json(path, report(session, machine=machine()))
    facts = json.loads(path.read_text())
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["packages"]["grpcio"]
    assert (facts["complete"], facts["reference"], facts["settings"]["mode"]) == (False, "none", "coupled")
    assert facts["same_outputs"] == {"compared": 1, "equal": 1}
    assert [(cell["policy"], cell["tokens_per_second"]) for cell in facts["cells"]] == [
        ("none", 10.0),
        ("fixed:1", None),
    ]
    assert [path] == list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="--json"):
        write_json(tmp_path / "missing" / "report.json", facts)


def test_pictures_are_svg_and_need_every_policys_name(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plan = Plan(("none", "fixed:1"), (1, 2))
    cells = [measured(p, 0, 10.0 * c, 10.0, concurrency=c) for p in plan.policies for c in plan.concurrencies]
    cells.append(measured("fixed:1", 1, None, concurrency=2))
    paths = plots.draw(tmp_path, summarise(cells, plan))
    assert [path.name for path in paths] == ["throughput.svg", "speed.svg", "verify-length.svg"]
    for path in paths:
        assert "</svg>" in path.read_text()
        assert "<!-- fixed:1 -->" in path.read_text()
    assert plots.draw(tmp_path, []) == paths


def test_pictures_without_matplotlib_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[train\]'"):
        plots.check_plots(tmp_path)
