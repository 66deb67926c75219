"""How a drafter's raw confidences become probabilities (DSpark §3.2.1), as its config.json says it.

One entry a setting, because acceptance differs by how tokens are chosen: c_k = sigmoid(logit_k / T_k + b_k). Knows the
format; leaves the fitting to `training.calibration`. Needs no torch: a router may read it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import ModelFileError
from dspark.files import write_json
from dspark.messages import Mode, Sampling
from dspark.models.config import read_json

__all__ = [
    "SETTINGS",
    "Calibration",
    "calibrations_to_json",
    "parse_calibrations",
    "setting_of",
    "write_calibrations",
]

SETTINGS = ("rejection", "coupled", "greedy")
_FIELDS = ("setting", "temperatures", "biases")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures T_k > 0 and biases b_k of one setting, one entry a block position."""

    setting: str
    temperatures: tuple[float, ...]
    biases: tuple[float, ...]


def setting_of(sampling: Sampling) -> str:
    """The setting that a request's tokens are chosen in; at temperature 0 both modes take the most likely token."""
    if sampling.greedy:
        return "greedy"
    return "rejection" if sampling.mode is Mode.REJECTION else "coupled"


def parse_calibrations(value: object, block_size: int, source: str) -> tuple[Calibration, ...]:
    """The config's `calibration` (None where it has none), checked; ModelFileError names `source` and what is wrong."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ModelFileError(f"{source}: calibration must be a list of objects, not {value!r}")
    parsed = tuple(_parse(entry, block_size, source) for entry in value)
    settings = [one.setting for one in parsed]
    if doubled := [setting for setting in SETTINGS if settings.count(setting) > 1]:
        raise ModelFileError(f"{source}: calibration has more than one entry for setting {doubled[0]!r}")
    return parsed


def calibrations_to_json(calibrations: Sequence[Calibration]) -> list[dict[str, Any]]:
    """What `parse_calibrations` reads back."""
    return [
        {"setting": one.setting, "temperatures": list(one.temperatures), "biases": list(one.biases)}
        for one in calibrations
    ]


def write_calibrations(path: Path, calibrations: Sequence[Calibration]) -> None:
    """Put calibrations into a drafter's config.json in place of those of the same settings; all else stays.

    The file is replaced whole or not at all. ModelFileError where it is no config, ConfigError where the disk refuses.
    """
    config = read_json(path)
    block_size = config.get("block_size")
    if not isinstance(block_size, int):
        raise ModelFileError(f"{path}: block_size must be a positive integer, not {block_size!r}")
    kept = {one.setting: one for one in parse_calibrations(config.get("calibration"), block_size, str(path))}
    merged = calibrations_to_json(list((kept | {one.setting: one for one in calibrations}).values()))
    parse_calibrations(merged, block_size, str(path))  # what would not be read again is not written
    write_json(path, {**config, "calibration": merged})


def _parse(entry: object, block_size: int, source: str) -> Calibration:
    if not isinstance(entry, Mapping):
        raise ModelFileError(f"{source}: a calibration must be an object, not {entry!r}")
    if odd := sorted(set(map(str, entry)) ^ set(_FIELDS)):
        raise ModelFileError(f"{source}: a calibration has the fields {', '.join(_FIELDS)}; not so: {odd[0]}")
    setting = entry["setting"]
    if setting not in SETTINGS:
        raise ModelFileError(f"{source}: calibration setting {setting!r} is none of {', '.join(SETTINGS)}")
    where = f"{source}: calibration of {setting!r}"
    temperatures = _numbers(entry["temperatures"], block_size, f"{where}: temperatures")
    if any(temperature <= 0 for temperature in temperatures):
        raise ModelFileError(f"{where}: temperatures must be positive, not {list(temperatures)!r}")
    return Calibration(setting, temperatures, _numbers(entry["biases"], block_size, f"{where}: biases"))


def _numbers(value: object, count: int, what: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not all(_is_number(one) for one in value):
        raise ModelFileError(f"{what} must list {count} finite numbers, one a block position, not {value!r}")
    return tuple(float(one) for one in value)


def _is_number(value: object) -> bool:
    # Neither NaN nor what would be infinite in the float32 that it is used in.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
