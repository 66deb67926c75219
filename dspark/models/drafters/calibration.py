"""How a drafter's raw confidences become probabilities (DSpark §3.2.1), as its config.json says it.

One entry a setting, because acceptance differs by how tokens are chosen. c_k is the sigmoid of a rising curve of
logit_k made of straight pieces: logit_k / T_k + b_k, and from each knot on another slope. Knows the format; leaves the
fitting to `training.calibration` and the arithmetic to `services.draft.confidence`. Needs no torch: a router may read
it too.
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
    "Bend",
    "Calibration",
    "calibrations_to_json",
    "parse_calibrations",
    "setting_of",
    "write_calibrations",
]

SETTINGS = ("rejection", "coupled", "greedy")
_FIELDS = ("setting", "temperatures", "biases")
_BENDS = "bends"  # may be missing: then all curves are straight

Bend = tuple[float, float]
"""A logit from which on a curve rises by so much more, or less, a logit."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperatures T_k > 0, biases b_k and bends of one setting, one entry a block position; no bends: straight lines.

    A position's bends are in the order of their knots, and its curve rises everywhere.
    """

    setting: str
    temperatures: tuple[float, ...]
    biases: tuple[float, ...]
    bends: tuple[tuple[Bend, ...], ...] = ()


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
        | ({_BENDS: [[list(bend) for bend in bends] for bends in one.bends]} if one.bends else {})
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
    if odd := sorted((set(map(str, entry)) - {_BENDS}) ^ set(_FIELDS)):
        known = ", ".join((*_FIELDS, _BENDS))
        raise ModelFileError(f"{source}: a calibration has the fields {known}; not so: {odd[0]}")
    setting = entry["setting"]
    if setting not in SETTINGS:
        raise ModelFileError(f"{source}: calibration setting {setting!r} is none of {', '.join(SETTINGS)}")
    where = f"{source}: calibration of {setting!r}"
    temperatures = _numbers(entry["temperatures"], block_size, f"{where}: temperatures")
    if any(temperature <= 0 for temperature in temperatures):
        raise ModelFileError(f"{where}: temperatures must be positive, not {list(temperatures)!r}")
    biases = _numbers(entry["biases"], block_size, f"{where}: biases")
    return Calibration(setting, temperatures, biases, _bends(entry.get(_BENDS), temperatures, f"{where}: bends"))


def _bends(value: object, temperatures: tuple[float, ...], what: str) -> tuple[tuple[Bend, ...], ...]:
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) != len(temperatures)
        or not all(isinstance(one, list) for one in value)
    ):
        raise ModelFileError(f"{what} must be {len(temperatures)} lists, one a block position, not {value!r}")
    return tuple(_rising(one, 1 / temperature, what) for one, temperature in zip(value, temperatures, strict=True))


def _rising(value: list[object], slope: float, what: str) -> tuple[Bend, ...]:
    """One position's bends; the curve must rise behind each of them."""
    found: list[Bend] = []
    for one in value:
        knot, turn = _numbers(one, 2, f"{what}: each", "a logit and a change of slope")
        slope += turn
        if slope <= 0 or (found and knot <= found[-1][0]):
            raise ModelFileError(f"{what} must be in the order of their logits and leave a rising curve, not {value!r}")
        found.append((knot, turn))
    return tuple(found)


def _numbers(value: object, count: int, what: str, which: str = "one a block position") -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count or not all(_is_number(one) for one in value):
        raise ModelFileError(f"{what} must list {count} finite numbers, {which}, not {value!r}")
    return tuple(float(one) for one in value)


def _is_number(value: object) -> bool:
    # Neither NaN nor what would be infinite in the float32 that it is used in.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
