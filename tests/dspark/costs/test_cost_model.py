"""Profiles as text and files, and the envelope over their points."""

import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dspark.costs import CostModel, CostProfile, Point
from dspark.costs.files import alone, loading, profiles_dir, read_profile, write_profile
from dspark.costs.profile import fingerprint_of

POINTS = st.lists(
    st.builds(Point, st.integers(1, 600), st.integers(0, 4096), st.floats(1e-5, 10.0)), min_size=1, max_size=40
).map(tuple)


def profile(*points: tuple[int, int, float], fingerprint: str = "f") -> CostProfile:
    return CostProfile("verify", fingerprint, tuple(Point(*point) for point in points), 1.5)


def model(*points: tuple[int, int, float]) -> CostModel:
    return CostModel(profile(*points))


# ---------------------------------------------------------------- profiles


@given(POINTS)
def test_a_profile_survives_as_text(points: tuple[Point, ...]) -> None:
    made = CostProfile("draft", "abc", points, 12.5)
    assert CostProfile.from_json(made.to_json()) == made
    later = json.loads(made.to_json()) | {"later_field": 1}
    assert CostProfile.from_json(json.dumps(later)) == made


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        '{"kind": "other", "fingerprint": "f", "points": [[1, 2, 3]], "made_at": 0}',
        '{"kind": "draft", "fingerprint": "f", "points": [], "made_at": 0}',
        '{"kind": "draft", "fingerprint": "f", "points": [{"tokens": 0, "context": 1, "seconds": 1}], "made_at": 0}',
        '{"kind": "draft", "fingerprint": "f", "points": [{"tokens": 1, "context": 1, "seconds": 0}], "made_at": 0}',
        '{"kind": "draft", "fingerprint": "f", "points": [{"tokens": 1, "context": 1, "seconds": NaN}], "made_at": 0}',
    ],
)
def test_what_is_no_profile_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        CostProfile.from_json(text)


def test_fingerprints_tell_kinds_and_facts_apart() -> None:
    facts = {"model": "m", "threads": 2}
    assert fingerprint_of("verify", facts) == fingerprint_of("verify", dict(reversed(facts.items())))
    assert len({fingerprint_of("verify", facts), fingerprint_of("draft", facts)}) == 2
    assert fingerprint_of("verify", facts) != fingerprint_of("verify", facts | {"threads": 1})
    assert len(fingerprint_of("verify", facts)) == 64


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    kept = profile((1, 64, 0.5), fingerprint="abc")
    assert read_profile("abc") is None
    write_profile(kept)
    assert read_profile("abc") == kept
    assert [path.name for path in profiles_dir().iterdir()] == ["abc.json"]
    (profiles_dir() / "broken.json").write_text("{")
    assert read_profile("broken") is None
    (profiles_dir() / "other.json").write_text(kept.to_json())  # renamed by hand: not of this fingerprint
    assert read_profile("other") is None


def test_a_disk_that_takes_nothing_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "file"))
    write_profile(profile((1, 64, 0.5)))
    assert read_profile("f") is None
    with alone(0.1):
        pass


def test_measurements_wait_for_each_other_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    log = []

    def other() -> None:
        with alone(5):
            log.append("other")

    thread = threading.Thread(target=other)
    with alone(5):
        thread.start()
        time.sleep(0.2)
        log.append("first")
        began = time.monotonic()
        with alone(0.2):
            assert 0.15 < time.monotonic() - began < 2
    thread.join()
    assert log == ["first", "other"]


def test_measurements_wait_for_what_others_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    log = []

    def measuring() -> None:
        with alone(5):
            log.append("measured")

    thread = threading.Thread(target=measuring)
    with loading(), loading():  # two load side by side
        thread.start()
        time.sleep(0.3)
        log.append("loaded")
    thread.join()
    assert log == ["loaded", "measured"]
    with alone(1):
        began = time.monotonic()
        with loading():  # loading waits for nobody
            assert time.monotonic() - began < 0.5


# ---------------------------------------------------------------- envelope


@given(POINTS, st.floats(0, 6000))
def test_costs_never_fall_with_tokens(points: tuple[Point, ...], context: float) -> None:
    table = CostModel(CostProfile("verify", "", points, 0.0)).table(800, context)
    assert (table > 0).all()
    assert (np.diff(table) >= -1e-12 * table[:-1]).all()


@example((Point(1, 0, 1.0), Point(1, 1, 2.0), Point(2, 1, 2.0)), 153)  # the smaller context ends steeper
@given(POINTS, st.integers(1, 800))
def test_costs_never_fall_with_context(points: tuple[Point, ...], tokens: int) -> None:
    made = CostModel(CostProfile("verify", "", points, 0.0))
    seconds = [made.predict(tokens, context) for context in range(0, 6000, 150)]
    assert all(after >= before * (1 - 1e-9) for before, after in itertools.pairwise(seconds))


@given(POINTS, st.integers(0, 700), st.floats(0, 6000))
def test_the_table_is_what_is_predicted(points: tuple[Point, ...], size: int, context: float) -> None:
    made = CostModel(CostProfile("verify", "", points, 0.0))
    table = made.table(size, context)
    assert table.shape == (size + 1,)
    assert table[0] == pytest.approx(made.predict(1, context))
    for tokens in {1, size // 2, size} - {0} if size else ():
        assert table[tokens] == pytest.approx(made.predict(tokens, context))


@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=12))
def test_measured_points_that_rise_are_kept(seconds: list[float]) -> None:
    rising = sorted(seconds)
    made = model(*((2**k, 64, value) for k, value in enumerate(rising)))
    assert [made.predict(2**k, 64) for k in range(len(rising))] == pytest.approx(rising)


def test_jagged_points_are_kept_raw_and_count_as_the_next_lower() -> None:
    made = model((1, 64, 1.0), (2, 64, 5.0), (4, 64, 2.0), (8, 64, 4.0))
    assert [point.seconds for point in made.profile.points] == [1.0, 5.0, 2.0, 4.0]
    assert made.envelope.tolist() == [[1.0, 2.0, 2.0, 4.0]]


def test_between_and_beyond_points() -> None:
    made = model((1, 64, 1.0), (3, 64, 3.0), (4, 64, 4.5), (1, 128, 2.0), (3, 128, 4.0), (4, 128, 6.5))
    assert made.predict(2, 64) == pytest.approx(2.0)
    assert made.predict(6, 64) == pytest.approx(4.5 + 2 * 1.5)
    assert made.predict(2, 96) == pytest.approx(2.5)
    assert made.predict(1, 0) == made.predict(1, 64) == 1.0
    assert made.predict(1, 256) == pytest.approx(2.0 + 2 * 1.0)
    assert made.predict(0, 64) == made.predict(1, 64)


def test_a_flat_end_goes_on_with_the_slope_of_the_whole() -> None:
    made = model((1, 64, 1.0), (2, 64, 2.0), (4, 64, 2.0))
    assert made.predict(7, 64) == pytest.approx(2.0 + 3 * (1.0 / 3))


def test_a_single_point_is_never_a_flat_curve() -> None:
    """A flat one would have everything verified."""
    assert model((4, 64, 2.0)).predict(4, 999) == 2.0
    assert model((4, 64, 2.0)).predict(8, 999) == 3.0


def test_a_long_context_measured_at_few_sizes_goes_on_like_the_shorter() -> None:
    short = [(1, 64, 1.0), (8, 64, 2.0), (64, 64, 10.0)]
    made = model(*short, (1, 2048, 1.5), (8, 2048, 4.0))
    assert made.predict(64, 2048) == pytest.approx(20.0)
    assert made.predict(64, (64 + 2048) / 2) == pytest.approx(15.0)


def test_one_point_far_too_high_raises_only_what_nothing_larger_contradicts() -> None:
    clean = [(2**k, 64, 1.0 + 0.1 * 2**k) for k in range(8)]
    spoilt = [(t, c, 20 * s if t == 16 else s) for t, c, s in clean]
    for tokens in (1, 8, 32, 128, 200):
        assert model(*spoilt).predict(tokens, 64) == pytest.approx(model(*clean).predict(tokens, 64))
    assert model(*spoilt).predict(16, 64) == pytest.approx(model(*clean).predict(32, 64))


def test_several_points_at_one_place_count_by_their_median() -> None:
    assert model((1, 64, 1.0), (1, 64, 9.0), (1, 64, 2.0)).predict(1, 64) == 2.0
