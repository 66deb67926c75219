"""What a part of a block takes to draft, as a share of a whole one: a profile knows whole blocks only.

Seen from the drafts of a worker, one number a length. Knows no requests and no clock.
"""

from __future__ import annotations

__all__ = ["Parts"]

PACE = 1 / 8
LEAST, MOST = 0.1, 1.5  # of a whole block: what is beyond was no measure of drafting


class Parts:
    """Of one draft worker's blocks. A length never seen is as dear as the next longer one that was."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}

    def observe(self, tokens: int, share: float) -> None:
        """A batch whose longest block had so many tokens took this share of what whole blocks would have."""
        share = min(max(share, LEAST), MOST)
        before = self._shares.setdefault(tokens, share)
        self._shares[tokens] = before + PACE * (share - before)

    def of(self, tokens: int) -> float:
        """The share expected."""
        return next((self._shares[longer] for longer in sorted(self._shares) if longer >= tokens), 1.0)
