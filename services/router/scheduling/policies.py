"""The rules by which verify lengths are chosen, by name: `none`, `fixed:N`, `threshold:X`, `adaptive`, `cap-accept`.

A policy sees one round's facts as arrays and gives lengths. All are lossless in every sampling mode: each admits a
draft by what was known before it was drawn, see `plan`. None but `adaptive` and `cap-accept` looks at costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dspark.errors import ConfigError
from services.router.scheduling.plan import FREE, Bools, Floats, Ints, Plan, choose, survival_of, trim

__all__ = [
    "FORMS",
    "Adaptive",
    "CapAccept",
    "Facts",
    "Fixed",
    "NoDrafts",
    "Outcome",
    "Policy",
    "Threshold",
    "mixed",
    "parse",
]

FORMS = "none, fixed:N (N ≥ 0), threshold:X (0 ≤ X ≤ 1), adaptive, cap-accept"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a round when its proposals are there. R requests decode in it; blocks have up to n tokens.

    Attributes:
        confidences: (R, n) c_{r,j}, corrected; 0 where nothing was proposed.
        most: (R,) from `plan.limits`.
        seconds: T over the step's rows, up to the most that it may have. Without costs only its length counts.
        base_rows: rows without drafts.
        unhidden: seconds of drafting that the round pays for.
        rejection: whether any request with drafts samples by rejection at a temperature above 0.
        before: (R, n) older survivals, bounded by `most` here.
        explored: (R,) from `survival.explore`.
        static: (R,) lengths settled by requests' own policies, `FREE` elsewhere.
        base_tokens: tokens of the step without drafts; R unless given.
        alternatives: (R, n) from `alternatives.worth`; None where nothing is known of any.
    """

    confidences: Floats
    most: Ints
    seconds: Floats
    base_rows: int
    unhidden: float = 0.0
    rejection: bool = False
    before: Floats | None = None
    explored: Ints | None = None
    static: Ints | None = None
    base_tokens: float | None = None
    alternatives: Floats | None = None

    @property
    def proposed(self) -> Ints:
        """(R,) draft tokens at hand that may be verified."""
        return np.asarray(np.minimum(self.most, np.count_nonzero(self.confidences > 0, axis=1)))

    @property
    def room(self) -> int:
        """Rows of the step that drafts may take."""
        return max(0, len(self.seconds) - 1 - self.base_rows)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy gives.

    Attributes:
        verify: (R,) draft tokens to verify.
        commit: (R,) of which at most so many are kept, with the token after them. Kept lengths are non-anticipating as
            verified ones are: the token after them is the target's, whether it came as an accepted draft or not.
        planned: (R,) lengths as they would have been without exploring.
        plan: expectations, where costs were looked at.
        alternatives: (R, n) to which drafts an alternative is verified; None: to none.
    """

    verify: Ints
    commit: Ints
    planned: Ints
    plan: Plan | None = None
    alternatives: Bools | None = None


class Policy(Protocol):
    """A rule for verify lengths."""

    @property
    def needs_costs(self) -> bool:
        """Whether it means nothing without a cost profile: a flat table makes it verify everything."""

    @property
    def shortens(self) -> bool:
        """Whether only so much of a block is asked for as is worth it (`reach`)."""

    def ask(self, block: int) -> int:
        """Draft tokens worth asking for, of a block."""

    def outcome(self, facts: Facts) -> Outcome:
        """The round's lengths."""


@dataclass(frozen=True, slots=True)
class _Static(ABC):
    """A rule that looks at neither costs nor load. Where the step is full, the longest are cut first."""

    @property
    def needs_costs(self) -> bool:
        """It does not."""
        return False

    @property
    def shortens(self) -> bool:
        """It asks for what it verifies."""
        return False

    def ask(self, block: int) -> int:
        """Of a block."""
        return block

    @abstractmethod
    def lengths(self, facts: Facts) -> Ints:
        """(R,) before the step's rows bound them."""

    def outcome(self, facts: Facts) -> Outcome:
        """The round's lengths."""
        lengths = self.lengths(facts)
        if facts.static is not None:
            lengths = np.where(facts.static == FREE, lengths, np.minimum(facts.static, facts.proposed))
        lengths = trim(lengths, facts.room)
        return Outcome(lengths, lengths, lengths)


@dataclass(frozen=True, slots=True)
class NoDrafts(_Static):
    """`none`: plain decoding."""

    def __str__(self) -> str:
        return "none"

    def ask(self, block: int) -> int:
        """Of a block."""
        del block
        return 0

    def lengths(self, facts: Facts) -> Ints:
        """(R,) by the rule."""
        return np.zeros(len(facts.most), np.int64)


@dataclass(frozen=True, slots=True)
class Fixed(_Static):
    """`fixed:N`: the first N of every block."""

    count: int

    def __str__(self) -> str:
        return f"fixed:{self.count}"

    def ask(self, block: int) -> int:
        """Of a block."""
        return min(self.count, block)

    def lengths(self, facts: Facts) -> Ints:
        """(R,) by the rule."""
        return np.minimum(facts.proposed, self.count)


@dataclass(frozen=True, slots=True)
class Threshold(_Static):
    """`threshold:X`: a block up to the first draft whose own confidence c_k is below X (DSpark §4.3.3).

    The threshold is on c_k, the chance of a draft given that all before it stood, not on the prefix's survival a_k: so
    X means the same at every position. c_k is known before x_k is drawn, so the rule is non-anticipating.
    """

    least: float

    def __str__(self) -> str:
        return f"threshold:{self.least:g}"

    def lengths(self, facts: Facts) -> Ints:
        """(R,) by the rule."""
        passed = np.logical_and.accumulate((facts.confidences >= self.least) & (facts.confidences > 0), axis=1)
        return np.asarray(np.minimum(np.count_nonzero(passed, axis=1), facts.most))


@dataclass(frozen=True, slots=True)
class _Scheduled:
    """A rule that goes by costs and load."""

    @property
    def needs_costs(self) -> bool:
        """It does."""
        return True

    def ask(self, block: int) -> int:
        """Of a block."""
        return block


@dataclass(frozen=True, slots=True)
class Adaptive(_Scheduled):
    """`adaptive`: the scheduler (DSpark §3.2.2)."""

    @property
    def shortens(self) -> bool:
        """What its plans cut need not be drafted."""
        return True

    def __str__(self) -> str:
        return "adaptive"

    def outcome(self, facts: Facts) -> Outcome:
        """The round's lengths."""
        survival = survival_of(facts.confidences, facts.most)
        forced = _forced(facts)
        before = facts.before
        if before is not None:
            before = np.where(np.arange(before.shape[1]) < facts.most[:, None], before, 0.0)
        plan = choose(
            survival,
            facts.seconds,
            facts.base_rows,
            facts.unhidden,
            rejection=facts.rejection,
            before=before,
            forced=forced,
            base_tokens=facts.base_tokens,
            alternatives=facts.alternatives,
        )
        planned = plan.lengths
        if facts.explored is not None:
            counterfactual = np.count_nonzero(survival >= plan.cut, axis=1)
            planned = np.where(_exploring(facts), np.minimum(counterfactual, planned), planned)
        return Outcome(plan.lengths, plan.lengths, planned, plan, plan.alternatives)


@dataclass(frozen=True, slots=True)
class CapAccept(_Scheduled):
    """`cap-accept`: verifies whole blocks, keeps the window that `adaptive` would have verified.

    For measuring: outcomes of all drafts are seen, also of those that trimming would hide, while output and progress
    are those of the adaptive plan over whole blocks. Saves no time.
    """

    @property
    def shortens(self) -> bool:
        """Whole blocks are what it is for."""
        return False

    def __str__(self) -> str:
        return "cap-accept"

    def outcome(self, facts: Facts) -> Outcome:
        """The round's lengths."""
        window = Adaptive().outcome(replace(facts, alternatives=None))
        whole = np.where(_exploring(facts) | _free(facts), facts.proposed, window.verify)
        verify = window.verify + trim(whole - window.verify, facts.room - int(window.verify.sum()))
        return Outcome(verify, window.verify, window.planned, window.plan)


def mixed(policies: Sequence[Policy], facts: Facts) -> Outcome:
    """The lengths of a round whose requests may follow different policies, one each.

    Static rules are settled first and the search goes on from there. One request under `cap-accept` has all that are
    scheduled verified as far as they were drafted, and committed as far as the plan goes.
    """
    distinct = list(dict.fromkeys(policies))
    if len(distinct) < 2:
        return distinct[0].outcome(facts) if distinct else NoDrafts().outcome(facts)
    settled = np.full(len(facts.most), FREE)
    for policy in distinct:
        if isinstance(policy, _Static):
            rows = np.array([own == policy for own in policies], np.bool_)
            settled[rows] = policy.lengths(facts)[rows]
    scheduled = [policy for policy in distinct if policy.needs_costs]
    leader = next((policy for policy in scheduled if isinstance(policy, CapAccept)), Adaptive()) if scheduled else _REST
    return leader.outcome(replace(facts, static=settled))


def _exploring(facts: Facts) -> Bools:
    """(R,) explored, and not under a rule of their own."""
    return _free(facts) & (facts.explored >= 0) if facts.explored is not None else np.zeros(len(facts.most), np.bool_)


def _free(facts: Facts) -> Bools:
    return facts.static == FREE if facts.static is not None else np.ones(len(facts.most), np.bool_)


def _forced(facts: Facts) -> Ints | None:
    """A request's own rule comes before exploration."""
    if facts.static is None or facts.explored is None:
        return facts.static if facts.explored is None else facts.explored
    return np.where(facts.static == FREE, facts.explored, facts.static)


_REST = NoDrafts()
"""Leads a round in which every length is settled."""


# ---------------------------------------------------------------- names


def parse(text: str) -> Policy:
    """The policy of a name. Raises `ConfigError`, naming the known forms."""
    name, separator, value = text.strip().partition(":")
    plain: dict[str, Callable[[], Policy]] = {"none": NoDrafts, "adaptive": Adaptive, "cap-accept": CapAccept}
    if name in plain and not separator:
        return plain[name]()
    try:
        if name == "fixed" and int(value) >= 0:
            return Fixed(int(value))
        if name == "threshold" and 0 <= float(value) <= 1:
            return Threshold(float(value))
    except ValueError:
        pass
    raise ConfigError(f"policy {text!r}: known are {FORMS}")
