"""Whether speculation pays at all, by what rounds really gave: steps back where it loses, and looks again later.

A plan is as good as its costs and confidences; this notices when they are wrong. Rounds with drafts are compared with
plain decoding at the same load, whose cost is predicted and corrected by the plain rounds that were seen. It knows of
rounds only what `observe` is told, so its decisions come from earlier rounds and are lossless in every mode. What to do
within a limit is `plan`'s and `whom`'s affair.

Levels are limits on the block, from all of it over half to none. A level is left when it loses beyond the noise, and a
longer one is taken up again when single probes of it win beyond the noise; between the two lies a margin. Probes that
lose, and returns that do not last, double the wait for the next probe; one that won is followed up soon.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Decision", "Payoff"]

MARGIN = 0.02  # of the plain time: less than this is neither won nor lost
SURE = 2.0  # standard errors
KEPT = 1 - 1 / 64  # of evidence, by round
ENOUGH = 12  # rounds before a level is judged
ENOUGH_PROBES = 4
MOST_PROBES = 12  # undecided after as many: it hardly pays
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # rounds between probes
LASTING = 512  # rounds of a level after which its past is forgiven
LIGHTER = 0.7  # of the load at which a level was left: probe at once
HEAVIER = 1.5  # times the load of the last rounds with drafts: what they won says nothing here
PLAIN_PACE = 1 / 16  # of the correction of plain costs
ODD = 4.0  # a round that took this many times what it saved, or the reverse, counts no further


@dataclass(frozen=True, slots=True)
class Decision:
    """For one round.

    Attributes:
        limit: draft tokens to propose and verify at most; 0 decodes plainly.
        probe: the round tries a longer block than is settled on.
    """

    limit: int
    probe: bool = False


@dataclass(slots=True)
class _Evidence:
    """Rounds of one level: how much of the plain time they saved. Recent rounds weigh more."""

    weight: float = 0.0
    squares: float = 0.0
    mean: float = 0.0
    spread: float = 0.0
    rounds: int = 0

    def add(self, saved: float) -> None:
        self.rounds += 1
        self.weight = self.weight * KEPT + 1
        self.squares = self.squares * KEPT**2 + 1
        step = saved - self.mean
        self.mean += step / self.weight
        self.spread += (step * (saved - self.mean) - self.spread) / self.weight

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if self.weight <= 1:
            return float("inf")
        unbiased = max(self.spread, 1e-6) * self.weight / (self.weight - 1)
        return float((unbiased * self.squares) ** 0.5 / self.weight)

    @property
    def loses(self) -> bool:
        return self.mean + SURE * self.error < -MARGIN

    @property
    def wins(self) -> bool:
        return self.mean - SURE * self.error > MARGIN


@dataclass(slots=True)
class Payoff:
    """The state of one cohort. Blocks have up to `block` draft tokens."""

    block: int
    _level: int = 0
    _settled: _Evidence = field(default_factory=_Evidence)
    _probed: _Evidence = field(default_factory=_Evidence)
    _wait: int = FIRST_WAIT
    _since: int = 0  # rounds since the last probe
    _lasted: int = 0  # rounds at this level
    _load: float = 0.0
    _left_at: float = 0.0  # the load at which the longer level was left
    _seen_at: float = 0.0  # the load of the last settled round with drafts
    _plain: float = 1.0  # observed over predicted seconds of plain rounds
    changes: int = 0

    @property
    def levels(self) -> tuple[int, ...]:
        """Limits, longest first."""
        return tuple(dict.fromkeys((self.block, (self.block + 1) // 2, 0)))

    @property
    def limit(self) -> int:
        """What is settled on."""
        return self.levels[self._level]

    @property
    def advantage(self) -> float:
        """Of the settled level over plain decoding, recently: tokens for a time, less 1. 0 where it is plain."""
        return self._settled.mean if self.limit else 0.0

    @property
    def wins(self) -> bool:
        """Whether rounds with drafts have lately beaten plain decoding beyond the noise, at a load not much lighter.

        Costs that say otherwise are then wrong: what rounds really gave goes before what they should have given.
        """
        enough = self.limit > 0 and self._settled.rounds >= ENOUGH
        return enough and self._settled.wins and self._load <= HEAVIER * self._seen_at

    def decide(self, load: int) -> Decision:
        """The limit for the next round, which has `load` rows before any drafts. Called once a round."""
        self._load += (load - self._load) / 8 if self._load else load
        if not self._level:
            return Decision(self.limit)
        self._since += 1
        lighter = self._load < LIGHTER * self._left_at
        if lighter:
            self._left_at, self._wait, self._probed = self._load, FIRST_WAIT, _Evidence()
        promising = self._probed.rounds and self._probed.mean > MARGIN
        if lighter or self._since >= (FIRST_WAIT if promising else self._wait):
            self._since = 0
            return Decision(self.levels[self._level - 1], probe=True)
        return Decision(self.limit)

    def observe(
        self,
        decision: Decision,
        *,
        drafted: bool,
        tokens: float,
        seconds: float,
        plain_tokens: float,
        plain_seconds: float,
    ) -> None:
        """Takes in a round.

        Args:
            decision: what it was decided to be.
            drafted: whether any request that goes by this was drafted for.
            tokens: that it emitted.
            seconds: that it took, with its drafting as far as nothing hid it.
            plain_tokens: that plain decoding would have emitted: one a running request.
            plain_seconds: T of the rows without drafts, by the costs.
        """
        if min(tokens, seconds, plain_tokens, plain_seconds) <= 0:
            return
        if not drafted:
            self._calibrate(seconds / plain_seconds)
            return
        worth = tokens / plain_tokens * plain_seconds * self._plain
        saved = min(max(worth / seconds, 1 / ODD), ODD) - 1
        if decision.probe:
            if self._level and decision.limit == self.levels[self._level - 1]:  # decided before a change, otherwise
                self._probed.add(saved)
                self._judge_probes()
        elif decision.limit and decision.limit == self.limit:
            self._settled.add(saved)
            self._seen_at = self._load
            self._judge_settled()

    def _calibrate(self, ratio: float) -> None:
        """Bounded, so that a single slow round moves little."""
        ratio = min(max(ratio, 0.5 * self._plain), 2 * self._plain)
        self._plain += PLAIN_PACE * (ratio - self._plain)

    def _judge_settled(self) -> None:
        self._lasted += 1
        if self._lasted >= LASTING and self._wait > FIRST_WAIT:
            self._wait, self._lasted = max(FIRST_WAIT, self._wait // 2), 0
        if self._settled.rounds >= ENOUGH and self._settled.loses:
            self._left_at = self._load
            self._go(self._level + 1)

    def _judge_probes(self) -> None:
        if self._probed.rounds < ENOUGH_PROBES:
            return
        if self._probed.wins:
            self._wait = min(2 * self._wait, LONGEST_WAIT)  # forgiven if it lasts
            self._go(self._level - 1)
        elif self._probed.loses or self._probed.rounds >= MOST_PROBES:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            self._probed = _Evidence()

    def _go(self, level: int) -> None:
        self._level = level
        self._settled, self._probed = _Evidence(), _Evidence()
        self._since = self._lasted = 0
        self.changes += 1
