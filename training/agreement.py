"""Whether a cluster's rounds are those that `training.rounds` plays: same texts, same committed lengths, same gains.

A round that a cluster plays at a committed length is compared with the one that is played there offline, so that one
difference does not bring others with it. Knows counts; where they come from is `dspark.evaluation`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.kernels import Kernels
from training.proposers import AnyDrafter
from training.rounds import play
from training.texts import Observed

__all__ = ["Agreement", "Stream", "compare"]


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream at a cluster: tokens that its rounds brought, None where they cannot be told, and missed proposals."""

    gains: tuple[int, ...] | None
    missed: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many of a cluster's rounds came out as they do offline.

    `rounds` were compared and `agreed` of them did. `missed` of the others brought one token where the cluster reports
    a missing proposal. `untold_streams` were left out, their rounds could not be told apart. `accepted` draft tokens
    were kept by the compared rounds: without any, agreement says little.
    """

    rounds: int
    agreed: int
    missed: int
    untold_streams: int
    accepted: int

    @property
    def share(self) -> float:
        """Of the compared rounds that had a proposal, those that agreed; 0 without any."""
        compared = self.rounds - self.missed
        return self.agreed / compared if compared else 0.0


def compare(
    drafter: AnyDrafter,
    texts: Sequence[Observed],
    streams: Sequence[Stream],
    setting: str,
    *,
    verify_length: int | None = None,
    draft_top_k: int = 64,
    kernels: Kernels | None = None,
) -> Agreement:
    """Compare streams with offline rounds along the texts they gave; settings are those of `play`, not "rejection"."""
    rounds = play(
        drafter,
        texts,
        setting,
        verify_length=verify_length,
        draft_top_k=draft_top_k,
        every=True,
        kernels=kernels,
    )
    columns = (rounds.text.tolist(), rounds.committed.tolist(), rounds.accepted.tolist())
    expected = {(text, committed): accepted + 1 for text, committed, accepted in zip(*columns, strict=True)}
    told = [(number, stream) for number, stream in enumerate(streams) if stream.gains is not None]
    parts = [_compared(number, texts[number], stream, expected) for number, stream in told]
    untold = len(streams) - len(told)
    return Agreement(
        sum(part.rounds for part in parts),
        sum(part.agreed for part in parts),
        sum(part.missed for part in parts),
        untold,
        sum(part.accepted for part in parts),
    )


def _compared(number: int, one: Observed, stream: Stream, expected: dict[tuple[int, int], int]) -> Agreement:
    gains = stream.gains or ()
    committed, agreed, empty = one.text.prompt_length + 1, 0, 0
    for gain in gains:
        same = gain == min(expected[number, committed], len(one.text) - committed)
        agreed += same
        empty += gain == 1 and not same
        committed += gain
    return Agreement(len(gains), agreed, min(empty, stream.missed), 0, sum(gains) - len(gains))
