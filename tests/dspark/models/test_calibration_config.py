"""The `calibration` of a drafter's config.json: read back as written, and refused by name where it is wrong."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import drafters

from dspark.errors import ConfigError, ModelFileError
from dspark.messages import Mode, Sampling
from dspark.models.drafters.calibration import (
    Calibration,
    calibrations_to_json,
    parse_calibrations,
    setting_of,
    write_calibrations,
)

GOOD = {"setting": "coupled", "temperatures": [1.5, 2, 0.5], "biases": [-0.25, 0, 1e-3]}
PARSED = Calibration("coupled", (1.5, 2.0, 0.5), (-0.25, 0.0, 1e-3))


BENDS = {"bends": [[[-1, 0.5], [2.5, -1]], [], [[0, -0.25]]]}
BENT = replace(PARSED, bends=(((-1.0, 0.5), (2.5, -1.0)), (), ((0.0, -0.25),)))


def test_what_is_written_is_read_back() -> None:
    assert parse_calibrations([GOOD | BENDS], 3, "here") == (BENT,)
    assert parse_calibrations(json.loads(json.dumps(calibrations_to_json([BENT]))), 3, "here") == (BENT,)
    assert parse_calibrations([GOOD], 3, "here") == (PARSED,)
    both = (PARSED, Calibration("greedy", (1.0,) * 3, (0.0,) * 3))
    assert parse_calibrations(json.loads(json.dumps(calibrations_to_json(both))), 3, "here") == both
    assert parse_calibrations(None, 3, "here") == ()
    assert parse_calibrations([], 3, "here") == ()


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({}, "calibration must be a list of objects, not {}"),
        ([3], "a calibration must be an object, not 3"),
        ([{"setting": "greedy", "temperatures": [1, 1, 1]}], "not so: biases"),
        ([GOOD | {"slope": 1}], "not so: slope"),
        ([GOOD | {"setting": "fast"}], "setting 'fast' is none of rejection, coupled, greedy"),
        ([GOOD | {"setting": ["greedy"]}], "setting ['greedy'] is none of"),
        ([GOOD, GOOD], "more than one entry for setting 'coupled'"),
        ([GOOD | {"temperatures": [1.0, 1.0]}], "calibration of 'coupled': temperatures must list 3 finite numbers"),
        ([GOOD | {"biases": [0.0] * 4}], "biases must list 3 finite numbers"),
        ([GOOD | {"biases": 0.5}], "biases must list 3 finite numbers"),
        ([GOOD | {"temperatures": [1.0, 0, 1.0]}], "temperatures must be positive, not [1.0, 0.0, 1.0]"),
        ([GOOD | {"temperatures": [1.0, -2, 1.0]}], "temperatures must be positive"),
        ([GOOD | {"temperatures": [1.0, float("inf"), 1.0]}], "temperatures must list 3 finite numbers"),
        ([GOOD | {"biases": [float("nan"), 0, 0]}], "biases must list 3 finite numbers"),
        ([GOOD | {"biases": [1e39, 0, 0]}], "biases must list 3 finite numbers"),
        ([GOOD | {"biases": [10**400, 0, 0]}], "biases must list 3 finite numbers"),
        ([GOOD | {"biases": [True, 0, 0]}], "biases must list 3 finite numbers"),
        ([GOOD | {"biases": ["0", 0, 0]}], "biases must list 3 finite numbers"),
        ([GOOD | {"bends": []}], "bends must be 3 lists, one a block position, not []"),
        ([GOOD | {"bends": [[], [], 1.0]}], "bends must be 3 lists"),
        ([GOOD | {"bends": [[[1, 0.1, 2]], [], []]}], "bends: each must list 2 finite numbers"),
        ([GOOD | {"bends": [[[float("nan"), 0.1]], [], []]}], "bends: each must list 2 finite numbers"),
        ([GOOD | {"bends": [[[1, 0.1], [1, 0.1]], [], []]}], "bends must be in the order of their logits"),
        ([GOOD | {"bends": [[[1, -0.7]], [], []]}], "and leave a rising curve, not [[1, -0.7]]"),
    ],
)
def test_what_is_wrong_is_named(value: Any, complaint: str) -> None:
    with pytest.raises(ModelFileError, match=r"^dir/config\.json: .*" + re.escape(complaint)):
        parse_calibrations(value, 3, "dir/config.json")


def test_a_request_has_one_setting() -> None:
    assert setting_of(Sampling()) == "coupled"
    assert setting_of(Sampling(mode=Mode.REJECTION)) == "rejection"
    assert (
        setting_of(Sampling(temperature=0.0)) == setting_of(Sampling(temperature=0.0, mode=Mode.REJECTION)) == "greedy"
    )


def test_a_config_keeps_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    before = drafters.published_config(block_size=3, auto_map={"ours": "é"}, rope_theta=1e6)
    path.write_text(json.dumps(before))
    write_calibrations(path, [PARSED])
    greedy = Calibration("greedy", (1.0, 2.0, 3.0), (0.0, -1.0, 1.0))
    write_calibrations(path, [greedy])
    newer = Calibration("coupled", (9.0,) * 3, (0.5,) * 3)
    write_calibrations(path, [newer])
    after = json.loads(path.read_text())
    assert parse_calibrations(after.pop("calibration"), 3, "here") == (newer, greedy)
    assert list(after.items()) == list(before.items())
    assert [one.name for one in tmp_path.iterdir()] == ["config.json"]


def test_a_config_that_cannot_be_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(drafters.published_config(block_size=4)))
    with pytest.raises(ModelFileError, match="must list 4 finite numbers"):
        write_calibrations(path, [PARSED])
    path.write_text(json.dumps({"block_size": "3"}))
    with pytest.raises(ModelFileError, match="block_size must be a positive integer, not '3'"):
        write_calibrations(path, [PARSED])
    with pytest.raises(ModelFileError, match="no such file"):
        write_calibrations(tmp_path / "gone.json", [PARSED])
    path.write_text(json.dumps(drafters.published_config(block_size=3)))
    kept = path.read_text()
    (tmp_path / "config.json.partial").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*config\.json: Is a directory"):
        write_calibrations(path, [PARSED])
    assert path.read_text() == kept
