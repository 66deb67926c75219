"""What speculation did for one request. Counted before stop truncation, prefill excluded."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Counts"]


@dataclass(slots=True)
class Counts:
    """Counters of `dspark.v1.SpeculationCounts`; τ is (accepted + rounds) / rounds.

    `verified_at[k-1]` counts k-th draft tokens whose predecessors were all accepted, `accepted_at[k-1]` those of them
    that were accepted too: their ratio is the conditional acceptance at k. A draft past what a round might keep counts
    in neither, whatever it was. Of what was verified and accepted, `alternatives` and `turned` were tokens beside
    drafts.
    """

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    missed_rounds: int = 0
    verified_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    alternatives: int = 0
    turned: int = 0

    def add_round(
        self,
        *,
        drafted: int,
        verified: int,
        accepted: int,
        missed: bool,
        matched: int | None = None,
        alternatives: int = 0,
        turned: bool = False,
    ) -> None:
        """One verify step that yielded a token. `matched`: drafts that stood, where fewer might be kept.

        `verified` and `accepted` are of drafts; `alternatives` were verified beside them, one taken if `turned`.
        """
        self.rounds += 1
        self.drafted += drafted + alternatives
        self.verified += verified + alternatives
        self.accepted += accepted + turned
        self.alternatives += alternatives
        self.turned += turned
        self.missed_rounds += missed
        cut = matched is not None and matched > accepted
        judged = accepted if cut else min(verified, accepted + 1)  # the first rejected one was, later ones were not
        grow = judged - len(self.verified_at)
        self.verified_at += [0] * grow
        self.accepted_at += [0] * grow
        for k in range(judged):
            self.verified_at[k] += 1
            self.accepted_at[k] += k < accepted
