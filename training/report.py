"""What drafters gain on a data set's prompts, without a cluster: the figures of `dspark train report` (DSpark §4).

A row is one drafter on one data set in one setting. Texts are answered once a temperature and observed once for all
drafters. Leaves rounds to `training.rounds`, times to `training.timing` and drawing to `training.figures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.devices import drafting
from dspark.errors import ConfigError
from dspark.kernels import Kernels
from dspark.models.drafters import Drafter
from dspark.models.drafters.calibration import SETTINGS, Calibration
from dspark.models.target import TargetModel
from training.proposers import AnyDrafter
from training.reliability import prefix_survival
from training.rounds import Rounds, follow, play
from training.texts import Observed, answer, loops, numbered_prompts, observe

__all__ = ["THRESHOLDS", "Plan", "Row", "SweepPoint", "make_rows", "sweep", "to_json"]

THRESHOLDS = tuple(step / 10 for step in range(10))


@dataclass(frozen=True, slots=True)
class Plan:
    """How texts are made: at `temperature` for the settings that draw; prompt i with seed + i."""

    settings: tuple[str, ...] = SETTINGS
    max_tokens: int = 96
    temperature: float = 1.0
    seed: int = 0
    verify_length: int | None = None
    batch: int = 64

    def temperature_of(self, setting: str) -> float:
        """At which a setting's texts are drawn."""
        return 0.0 if setting == "greedy" else self.temperature


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Draft tokens are verified while the prefix survival a_k = c_1 · … · c_k is at least `threshold`.

    `acceptance`: the share of verified draft tokens that the target kept, NaN where none was verified; `kept`: draft
    tokens verified a round; `tau`: tokens gained a round. Rounds go on behind what the trimmed ones accepted.
    """

    threshold: float
    acceptance: float
    kept: float
    tau: float


@dataclass(frozen=True, slots=True)
class Row:
    """One drafter on one data set in one setting.

    `tau_without_loops`: over answers that do not repeat themselves (`training.texts.loops`), greedy setting only; NaN
    where all do. `calibrated`: whether the sweep's confidences are; it is empty for a drafter without confidences.
    """

    drafter: str
    data: str
    setting: str
    texts: int
    looping_texts: int
    rounds: int
    tau: float
    tau_without_loops: float | None
    conditional_acceptance: tuple[float, ...]
    calibrated: bool
    sweep: tuple[SweepPoint, ...]


def make_rows(
    target: TargetModel,
    drafters: Mapping[str, AnyDrafter],
    prompts: Mapping[str, Sequence[Sequence[int]]],
    plan: Plan,
    said: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Every row; `said` hears what is being done.

    Raises:
        ConfigError: a setting that draws at temperature 0, or what `answer` and `play` refuse.
    """
    if plan.temperature == 0 and set(plan.settings) - {"greedy"}:
        raise ConfigError("at temperature 0 there is only the greedy setting")
    rows = []
    for data, ids in prompts.items():
        for temperature in dict.fromkeys(map(plan.temperature_of, plan.settings)):
            settings = [setting for setting in plan.settings if plan.temperature_of(setting) == temperature]
            said(f"{data}: answers at temperature {temperature:g}")
            texts = _observed(target, drafters, ids, temperature, plan, laws="rejection" in settings)
            for setting in settings:
                for name, drafter in drafters.items():
                    said(f"{data}: {name}, {setting}")
                    rows.append(_row(name, drafter, data, texts, setting, plan, drafting(target.kernels)))
    return rows


def sweep(every: Rounds, calibration: Calibration | None = None) -> tuple[SweepPoint, ...]:
    """Static thresholds on the prefix survival (DSpark §4.3.3), from rounds at every committed length."""
    survival = prefix_survival(every, calibration).nan_to_num(0.0)
    return tuple(_point(every, survival, threshold) for threshold in THRESHOLDS)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON has them, numbers that are none as null."""
    return [_plain(asdict(row)) for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _observed(
    target: TargetModel,
    drafters: Mapping[str, AnyDrafter],
    prompts: Sequence[Sequence[int]],
    temperature: float,
    plan: Plan,
    *,
    laws: bool,
) -> list[Observed]:
    texts = answer(target, numbered_prompts(prompts, temperature, plan.seed), plan.max_tokens, batch=plan.batch)
    models = [drafter for drafter in drafters.values() if isinstance(drafter, Drafter)]
    return observe(target, texts, models, laws=laws)


def _row(
    name: str,
    drafter: AnyDrafter,
    data: str,
    texts: Sequence[Observed],
    setting: str,
    plan: Plan,
    kernels: Kernels,
) -> Row:
    every = play(
        drafter, texts, setting, verify_length=plan.verify_length, batch=plan.batch, every=True, kernels=kernels
    )
    rounds, calibration = follow(every, every.drafted), _calibration(drafter, setting)
    looping = torch.tensor([loops(one.text) for one in texts])
    greedy = setting == "greedy"
    return Row(
        drafter=name,
        data=data,
        setting=setting,
        texts=len(texts),
        looping_texts=int(looping.sum()),
        rounds=len(rounds),
        tau=rounds.tau,
        tau_without_loops=_tau(rounds.select(~looping[rounds.text])) if greedy else None,
        conditional_acceptance=tuple(rounds.conditional_acceptance()),
        calibrated=calibration is not None,
        sweep=sweep(every, calibration) if _has_confidences(every) else (),
    )


def _tau(rounds: Rounds) -> float:
    return rounds.tau if len(rounds) else math.nan


def _calibration(drafter: AnyDrafter, setting: str) -> Calibration | None:
    known = drafter.config.calibration if isinstance(drafter, Drafter) else ()
    return next((one for one in known if one.setting == setting), None)


def _has_confidences(rounds: Rounds) -> bool:
    drafted = torch.arange(rounds.block_size) < rounds.drafted[:, None]
    return bool(drafted.any()) and not bool(rounds.logits[drafted].isnan().any())


def _point(every: Rounds, survival: Tensor, threshold: float) -> SweepPoint:
    rounds = follow(every, torch.minimum((survival >= threshold).long().cumprod(-1).sum(-1), every.drafted))
    kept, accepted = int(rounds.drafted.sum()), int(rounds.accepted.sum())
    share = accepted / kept if kept else math.nan
    return SweepPoint(threshold, share, kept / len(rounds) if len(rounds) else 0.0, rounds.tau)
