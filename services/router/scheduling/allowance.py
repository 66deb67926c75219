"""How much drafting may lose: a hundredth of plain decoding's time, whatever costs say.

Where drafts neither clearly win nor clearly lose, costs that are a few per cent off draft for ever, and no short series
of rounds shows it. So what was lost is added up as it comes: what plain decoding would have given in the seconds that
went by, less what was given, the slow first rounds of drafters and the rounds after their last included. While too much
was lost, and the last rounds do not win it back, nobody is drafted for, and plain rounds pay it off. They do so the
sooner, the more they forgo by the evidence of rounds with drafts, but half as fast each time that it was closed since
drafts last won. It knows earlier rounds only, so it is lossless in every mode. Whether a level of drafting is worth its
while within this is `payoff`'s question.

Sizes of load are 1, 2 to 3, 4 to 7 rows and so on, and each has an account of its own, in plain rounds' time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Allowance"]

SHARE = 0.01  # of a round, that a plain one adds
BEGIN = 6.0  # rounds, at first: some of the first rounds' luck, and costs that are not known yet
FULL = 2.0  # as far as plain ones fill it up
MOST = 8.0  # as far as rounds with drafts do that win: no single slow one of them closes it
LEAST = -2.0  # what was lost beyond is forgiven
REOPEN = 1.0  # has to be there before anybody is drafted for again
ODD = 6.0  # more than that is not counted of one round
HOPE = 0.5  # of a round won by each, before any was seen since it was opened: some five that lose a little end it
GRACE = 32  # rounds in debt, by which it has to be won back even so
TREND_PACE = 1 / 4  # of what a round wins, one at most here: so a single slow one ends nothing


@dataclass(slots=True)
class _Account:
    """At one size of load."""

    left: float = BEGIN
    open: bool = True
    trend: float = HOPE  # won by a round, lately
    indebted: int = 0  # rounds
    closings: int = 0  # since drafts last filled it up

    def add(self, won: float, most: float) -> None:
        self.left = max(min(self.left + won, max(self.left, most)), LEAST)
        self.indebted = self.indebted + 1 if self.left < 0 else 0
        if self.open:
            self.open = self.left >= 0 or (self.trend > 0 and self.indebted < GRACE)
            self.closings += not self.open
        elif self.left >= REOPEN:
            self.open, self.trend = True, HOPE


@dataclass(slots=True)
class Allowance:
    """The accounts of one cohort."""

    _sizes: dict[int, _Account] = field(default_factory=dict)

    def open(self, load: int) -> bool:
        """Whether anybody may be drafted for in a round of `load` rows before any drafts."""
        return self._at(load).open

    def plain(self, load: int, *, forgone: float = 0.0) -> None:
        """A round went by that had nothing to do with drafts.

        `forgone`: of a plain round, what one with drafts would have won by the evidence, where that is sure; else 0.
        """
        account = self._at(load)
        account.add(SHARE if account.open else SHARE + forgone * 0.5**account.closings, FULL)

    def tried(self, load: int, *, gained: float, took: float, usual: bool = True) -> None:
        """A round with drafts went by, or one before or after them whose features were sent.

        Args:
            load: that it was decided for.
            gained: its tokens over a plain round's.
            took: its seconds over a plain round's.
            usual: it had drafts, and neither a drafter nor a context was new: more of the kind will be like it. Others
                only lose.
        """
        account, won = self._at(load), max(gained - took, -ODD)
        if usual:
            account.trend += TREND_PACE * (min(max(won, -1.0), 1.0) - account.trend)
        account.add(won if usual else min(won, SHARE), MOST)
        if usual and account.left >= FULL and account.trend > 0:
            account.closings = 0

    def _at(self, load: int) -> _Account:
        return self._sizes.setdefault(load.bit_length(), _Account())
