"""Rounds from prompts: the target answers, is observed along its answers, and a drafter is played, piece by piece.

What is kept of a text while it is played takes some 0.4 MB; of its rounds only numbers stay. So any number of prompts
goes through in pieces. Leaves each stage to its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dspark.devices import drafting
from dspark.models.drafters import Drafter
from dspark.models.target import TargetModel
from training.rounds import Rounds, play
from training.texts import answer, numbered_prompts, observe

__all__ = ["Answering", "gather"]

_PIECE = 256


@dataclass(frozen=True, slots=True)
class Answering:
    """How prompts are answered: at most `max_new` tokens each, `batch` at once.

    In settings other than greedy at `temperature` and `repeat` times, the i-th answer with seed + i.
    """

    max_new: int = 96
    repeat: int = 1
    temperature: float = 1.0
    seed: int = 0
    batch: int = 64


def gather(
    target: TargetModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[str],
    how: Answering,
    passed: Callable[[int], None] = lambda _: None,
) -> dict[str, Rounds]:
    """Rounds of each setting; `passed` hears how many answers have gone through all their settings."""
    drawn = [setting for setting in settings if setting != "greedy"]
    rounds: dict[str, Rounds] = {}
    if drawn:
        rounds |= _pieces(target, drafter, [*prompts] * how.repeat, drawn, how, passed)
    if "greedy" in settings:
        rounds |= _pieces(target, drafter, prompts, ["greedy"], replace(how, temperature=0.0), passed)
    return rounds


def _pieces(
    target: TargetModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[str],
    how: Answering,
    passed: Callable[[int], None],
) -> dict[str, Rounds]:
    asked = numbered_prompts(prompts, how.temperature, how.seed)
    parts: dict[str, list[Rounds]] = {setting: [] for setting in settings}
    for first in range(0, len(asked), _PIECE):
        texts = answer(target, asked[first : first + _PIECE], how.max_new, batch=how.batch)
        observed = observe(target, texts, [drafter], laws="rejection" in settings)
        for setting in settings:
            rounds = play(drafter, observed, setting, batch=how.batch, kernels=drafting(target.kernels))
            parts[setting].append(replace(rounds, text=rounds.text + first))
        passed(len(texts))
    return {setting: Rounds.joined(played) for setting, played in parts.items()}
