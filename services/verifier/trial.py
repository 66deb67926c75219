"""Rejection of a block of draft tokens as one: how many stand, decided from numbers met row by row.

Token by token, x_i stands with probability min(1, p / q) and takes the whole block with it when it falls. A block on
trial as one (Sun et al., "Block Verification Accelerates Speculative Decoding", ICLR 2025, Algorithm 2) carries over
what a likely token leaves to spare:

    w_0 = 1,  w_i = min(1, w_{i-1} p(x_i) / q(x_i))

The first i of n tokens may be the ones that stand with probability

    h_n = w_n,  h_i = R_i / (R_i + 1 - w_i),  R_i = sum over x of max(0, w_i p(x) - q(x))

and the last i whose own number lies below h_i does; the token after it is drawn from max(0, w_i p - q), renormalised,
or from p where the whole block stands. Then i tokens or more stand with probability w_i given the first i, however
many more are on trial: so whether there is a next one may depend on all tokens before it, as in token by token
rejection, and the same rule of DSpark's Appendix A keeps both exact. With one token the two are one.

A block's rows are all looked at, as a later token may make up for an unlikely one, unless w becomes 0. Where
probabilities come from is left to `services.verifier.verification`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Trial", "carried"]


def carried(weight: float, p: float, q: float) -> float:
    """w_i from w_{i-1} and the i-th token's probabilities under target and drafter, q > 0."""
    return min(1.0, weight * p / q)


class Trial:
    """One block's way through its rows.

    `weight` is w of the row on trial, `stood` how many tokens stand if none of the following do, `accept` and
    `residual` the uniforms in (0, 1) of each draft position.
    """

    def __init__(self, accept: Sequence[float], residual: Sequence[float]) -> None:
        self.residual = residual
        self.weight = 1.0
        self.stood = 0
        self._accept = accept
        self._left = 1.0
        self._settled = False

    def goes_on(
        self, at: int, p: float, q: float, shared: float, rule: Callable[[float, float, float], float] = carried
    ) -> bool:
        """Whether the row behind `at` tokens is passed, the last only if all stand; otherwise `stood` is final.

        Args:
            at: rows passed so far.
            p: the target's probability of the next draft token.
            q: the drafter's.
            shared: sum over x of min(w p(x), q(x)) at this row, w being `weight`.
            rule: gives the next weight.
        """
        if self._settled:
            return False
        left = max(0.0, self.weight - shared)
        if at and self._accept[at - 1] * (left + 1.0 - self.weight) < left:
            self.stood, self._left = at, self.weight
        following = rule(self.weight, p, q)
        last = at + 1 == len(self._accept)
        if following == 0.0 or (last and self._accept[at] >= following):
            return False
        self.weight = following
        return True

    def go_back(self) -> None:
        """Return to the row behind the last token that stands, to draw what follows it."""
        self.weight, self._settled = self._left, True
