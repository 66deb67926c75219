"""Measured step times as they were measured, and their text form. What they say of other steps is `model`'s affair."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

__all__ = ["CostProfile", "Kind", "Point", "fingerprint_of"]

Kind = Literal["verify", "draft"]


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step.

    Attributes:
        tokens: rows of a verify step, requests of a draft; at least 1.
        context: mean context length of the sequences in it.
        seconds: what it took.
    """

    tokens: int
    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CostProfile:
    """The raw points of one worker's kind of step, and what they hold for.

    Real curves are jagged and stay so here; `CostModel` smooths. `made_at` is Unix seconds. `ValueError` where there is
    no point, or one that cannot have been measured.
    """

    kind: Kind
    fingerprint: str
    points: tuple[Point, ...]
    made_at: float

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("points: a profile has at least one")
        for point in self.points:
            if point.tokens < 1 or point.context < 0 or not 0.0 < point.seconds < math.inf:
                raise ValueError(f"points: {point} cannot have been measured")

    def to_json(self) -> str:
        """The kept text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> CostProfile:
        """The profile in a kept text; fields it does not know are ignored. `ValueError` where it is none."""
        try:
            return _ADAPTER.validate_python(json.loads(text))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_ADAPTER = TypeAdapter(CostProfile)


def fingerprint_of(kind: Kind, facts: Mapping[str, Any]) -> str:
    """Hex sha256 of everything that step times depend on: two workers of one fingerprint share a profile."""
    text = json.dumps({"kind": kind, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
