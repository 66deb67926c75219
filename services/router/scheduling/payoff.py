"""Whether speculation pays at all, by what rounds really gave: steps back where it loses, and looks again later.

A plan is as good as its costs and confidences; this notices when they are wrong. Rounds with drafts are compared with
plain decoding at the same load, whose cost is predicted and corrected by the plain rounds that were seen. It knows of
rounds only what `observe` is told, so its decisions come from earlier rounds and are lossless in every mode. What to do
within a limit is `plan`'s and `whom`'s affair.

Levels are limits on the block, from all of it over half to none. A level is left when it loses beyond the noise, and a
longer one is taken up again when single probes of it win beyond the noise; between the two lies a margin. Probes that
lose, and returns that do not last, double the wait for the next probe; one that won is followed up soon.

What drafts win for one stream says nothing of sixteen, so each size of load has a state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Decision", "Payoff", "Payoffs"]

MARGIN = 0.02  # of the plain time: less than this is neither won nor lost
SURE = 2.0  # standard errors
KEPT = 1 - 1 / 64  # of evidence, by round
ENOUGH = 12  # rounds before a level is judged
ENOUGH_PROBES = 4
MOST_PROBES = 12  # undecided after as many: it hardly pays
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # rounds between probes
LASTING = 512  # rounds of a level after which its past is forgiven
PLAIN_PACE = 1 / 64  # of the correction of plain costs
ODD = 4.0  # a round that took this many times what it saved, or the reverse, counts no further


@dataclass(frozen=True, slots=True)
class Decision:
    """For one round.

    Attributes:
        limit: draft tokens to propose and verify at most; 0 decodes plainly.
        probe: the round tries a longer block than is settled on.
        load: rows of the round before any drafts, that it was decided for.
    """

    limit: int
    probe: bool = False
    load: int = 1


@dataclass(slots=True)
class _Evidence:
    """Rounds of one level: what they were worth in plain seconds by the costs, a second. Recent rounds weigh more.

    `plain` is what seconds by the costs are really worth. It may be learned later than the rounds were seen.
    """

    weight: float = 0.0
    squares: float = 0.0
    mean: float = 0.0
    spread: float = 0.0
    rounds: int = 0

    def add(self, worth: float) -> None:
        self.rounds += 1
        self.weight = self.weight * KEPT + 1
        self.squares = self.squares * KEPT**2 + 1
        step = worth - self.mean
        self.mean += step / self.weight
        self.spread += (step * (worth - self.mean) - self.spread) / self.weight

    def saved(self, plain: float) -> float:
        """Of the plain time."""
        return self.mean * plain - 1 if self.rounds else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if self.weight <= 1:
            return float("inf")
        unbiased = max(self.spread, 1e-6) * self.weight / (self.weight - 1)
        return float((unbiased * self.squares) ** 0.5 / self.weight)

    def loses(self, plain: float) -> bool:
        return self.saved(plain) + SURE * self.error * plain < -MARGIN

    def wins(self, plain: float) -> bool:
        return self.saved(plain) - SURE * self.error * plain > MARGIN


@dataclass(slots=True)
class Payoff:
    """The state of one cohort at one size of load. Blocks have up to `block` draft tokens."""

    block: int
    plain: float = 1.0  # observed over predicted seconds of plain rounds
    _level: int = 0
    _settled: _Evidence = field(default_factory=_Evidence)
    _probed: _Evidence = field(default_factory=_Evidence)
    _wait: int = FIRST_WAIT
    _since: int = 0  # rounds since the last probe
    _lasted: int = 0  # rounds at this level
    _plains: int = 0
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
        return self._settled.saved(self.plain) if self.limit else 0.0

    @property
    def wins(self) -> bool:
        """Whether rounds with drafts have lately beaten plain decoding beyond the noise.

        Costs that say otherwise are then wrong: what rounds really gave goes before what they should have given.
        """
        return self.limit > 0 and self._settled.rounds >= ENOUGH and self._settled.wins(self.plain)

    def decide(self, load: int, rounds: int = 1) -> Decision:
        """The limit for the next round, which has `load` rows before any drafts. `rounds`: since it was last asked."""
        if not self._level:
            return Decision(self.limit, load=load)
        self._since += rounds
        promising = self._probed.saved(self.plain) > MARGIN
        if self._since >= (FIRST_WAIT if promising else self._wait):
            self._since = 0
            return Decision(self.levels[self._level - 1], probe=True, load=load)
        return Decision(self.limit, load=load)

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
            tokens: that it emitted, those of other routers in its step included.
            seconds: that it took as a whole.
            plain_tokens: that plain decoding would have emitted: one a sequence, others' in the step included.
            plain_seconds: T of the rows without drafts, by the costs.
        """
        if min(tokens, seconds, plain_tokens, plain_seconds) <= 0:
            return
        if not drafted:
            self._calibrate(seconds / plain_seconds)
            return
        worth = tokens / plain_tokens * plain_seconds / seconds
        worth = min(max(worth, 1 / (ODD * self.plain)), ODD / self.plain)
        if decision.probe:
            if self._level and decision.limit == self.levels[self._level - 1]:  # decided before a change, otherwise
                self._probed.add(worth)
                self._judge_probes()
        elif decision.limit and decision.limit == self.limit:
            self._settled.add(worth)
            self._judge_settled()

    def _calibrate(self, ratio: float) -> None:
        """Bounded, so that a single slow round moves little."""
        ratio = min(max(ratio, 0.5 * self.plain), 2 * self.plain)
        self._plains += 1
        self.plain += max(PLAIN_PACE, 1 / (self._plains + 1)) * (ratio - self.plain)

    def _judge_settled(self) -> None:
        self._lasted += 1
        if self._lasted >= LASTING and self._wait > FIRST_WAIT:
            self._wait, self._lasted = max(FIRST_WAIT, self._wait // 2), 0
        if self._settled.rounds >= ENOUGH and self._settled.loses(self.plain):
            self._go(self._level + 1)

    def _judge_probes(self) -> None:
        if self._probed.rounds < ENOUGH_PROBES:
            return
        if self._probed.wins(self.plain):
            self._wait = min(2 * self._wait, LONGEST_WAIT)  # forgiven if it lasts
            self._go(self._level - 1)
        elif self._probed.loses(self.plain) or self._probed.rounds >= MOST_PROBES:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
            self._probed = _Evidence()

    def _go(self, level: int) -> None:
        self._level = level
        self._settled, self._probed = _Evidence(), _Evidence()
        self._since = self._lasted = 0
        self.changes += 1


class Payoffs:
    """The payoffs of one cohort, one for each size of load: 1, 2 to 3, 4 to 7 rows and so on."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._sizes: dict[int, Payoff] = {}
        self._load = 1

    @property
    def now(self) -> Payoff:
        """At the load that was last decided for."""
        return self._at(self._load)

    def decide(self, load: int, rounds: int = 1, *, allowed: bool = True) -> Decision:
        """As `Payoff.decide`; where nothing is allowed, plain decoding, and no probe is used up."""
        self._load = load
        return self.now.decide(load, rounds) if allowed else Decision(0, load=load)

    def of(self, decision: Decision) -> Payoff:
        """Of the load that a round was decided for, whose lesson may come when there is another."""
        return self._at(decision.load)

    def _at(self, load: int) -> Payoff:
        size = load.bit_length()
        if size not in self._sizes:
            near = min(self._sizes, key=lambda other: abs(other - size), default=None)
            self._sizes[size] = Payoff(self.block, plain=1.0 if near is None else self._sizes[near].plain)
        return self._sizes[size]
