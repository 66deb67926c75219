"""Whom a waiting step had better wait for: routers that share a worker are to share its steps.

Two routers that are not held back fall into alternation: while one's rows are computed the other's verdicts are on
their way, its next step waits in turn, and hardly two steps ever meet. A forward costs nearly as much for half of the
rows, so each step of such a pair pays twice what is fixed in it, and drafters on the same cores compute beside steps.
Callers that were once together are answered together and come back together: to meet takes one long wait, to stay
together short ones. So whether waiting pays is seen from how it went, and not from how soon a caller comes back while
it alternates. Knows when callers come and go and what a joined step saves; that steps wait, and what is in them, is
other modules' affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

__all__ = ["Company", "Load", "Saved"]

PATIENCE = 2.0  # times what joining saves, that a step waits at most
AWAY = 8.0  # times that, after which a caller has nothing to do here
PACE = 1 / 8  # of the mean that gains are followed by
LONGEST_PAUSE = 64  # steps without a caller before it is waited for again, doubling from one

Load = tuple[int, float]
"""How much a step computes: rows, and the mean number of committed tokens before them."""

Saved = Callable[[Load, Load], float]
"""Seconds that one step of both loads takes less than one of each."""


@dataclass(slots=True)
class _Caller:
    """One router's session. `gain`: seconds that waiting for it wins on average, lately."""

    load: Load
    pending: int = 0  # steps sent and not answered: a router may have several cohorts
    answered_at: float | None = None
    alone: bool = True  # nothing has run since then: whoever was answered with it has not gone on without it
    awaited: tuple[float, float] | None = None  # since when, and what joining will have saved
    gain: float = 0.0
    pause: int = 0
    failures: int = 0

    def back(self, now: float) -> None:
        """It has sent its next step."""
        if self.awaited is not None:
            since, saved = self.awaited
            self._learn(saved - (now - since) if self.alone else saved)  # to meet at all is worth any wait
        self.pending += 1
        self.answered_at = self.awaited = None

    def missed(self, now: float) -> None:
        """A step runs without it."""
        if self.awaited is not None:
            self._learn(self.awaited[0] - now)
        self.pause = max(0, self.pause - 1)
        self.awaited, self.alone = None, False

    def _learn(self, gain: float) -> None:
        self.gain += PACE * (gain - self.gain)
        if self.gain >= 0.0:
            self.failures = 0
            return
        self.gain = 0.0
        self.pause = min(LONGEST_PAUSE, 1 << self.failures) + 1
        self.failures = min(self.failures + 1, LONGEST_PAUSE.bit_length())


class Company:
    """Callers that are answered and come back. Times are seconds of one clock; callers are compared by identity."""

    def __init__(self, saved: Saved, *, max_rows: int) -> None:
        """`max_rows`: of a joined step."""
        self._saved = saved
        self._max_rows = max_rows
        self._callers: WeakKeyDictionary[object, _Caller] = WeakKeyDictionary()

    def asked(self, caller: object, load: Load, now: float) -> None:
        """The caller has sent its next step."""
        known = self._callers.setdefault(caller, _Caller(load))
        known.load = load
        known.back(now)

    def answered(self, caller: object, now: float) -> None:
        """The caller has the verdicts of one of its steps."""
        known = self._callers.get(caller)
        if known is None:
            return  # it has left
        known.pending -= 1
        known.answered_at = None if known.pending else now
        known.alone = True

    def left(self, caller: object) -> None:
        """The caller comes back no more."""
        self._callers.pop(caller, None)

    def runs(self, now: float) -> None:
        """A step runs, without whoever is absent."""
        for caller in self._absent():
            caller.missed(now)

    def worth(self, present: Load, since: float, now: float) -> float:
        """Until when a step that could have run `since` then goes on waiting; `now` where not any more.

        Whom it is to wait for is noted: what becomes of it is learned as that caller asks, or a step runs without it.
        """
        return max((self._until(caller, present, since, now) for caller in self._absent()), default=now)

    def _absent(self) -> list[_Caller]:
        return [caller for caller in self._callers.values() if caller.answered_at is not None]

    def _until(self, caller: _Caller, present: Load, since: float, now: float) -> float:
        assert caller.answered_at is not None
        if caller.pause or present[0] + caller.load[0] > self._max_rows:
            return now
        saved = self._saved(present, caller.load)
        until = since + PATIENCE * saved
        if until <= now or now > caller.answered_at + AWAY * saved:
            return now
        caller.awaited = since, saved
        return until
