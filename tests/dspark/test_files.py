"""Whole or not at all."""

import json
from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.files import whole, write_json


def test_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with whole(path) as partial:
        partial.write_text("{}")
        assert json.loads(path.read_text()) == {"a": 1}
    assert path.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(ZeroDivisionError), whole(path) as partial:
        partial.write_text(str(1 / partial.write_text("")))
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_disk_that_refuses_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere/facts\.json: No such file"):
        write_json(tmp_path / "nowhere" / "facts.json", {})
