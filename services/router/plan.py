"""How many draft tokens of each sequence are verified, and how much of each prompt is computed: pure functions.

Neither looks at a token, so that any plan is non-anticipating (DSpark Appendix A).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Room", "level", "plan", "wanted"]


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds one sequence's verify length.

    Attributes:
        proposed: draft tokens at hand; 0 without a proposal.
        left: tokens the request may still emit. A round emits one more than it accepts.
        cap: the request's own limit.
    """

    proposed: int
    left: int
    cap: int | None = None


def wanted(left: int, cap: int | None, verify_length: int) -> int:
    """Draft tokens worth asking for: none where only one token is left."""
    return max(0, min(verify_length, left - 1, verify_length if cap is None else cap))


def plan(rooms: Iterable[Room], *, verify_length: int, budget: int) -> list[int]:
    """The verify lengths of a round: fixed, as far as each sequence's room and the step's free rows allow.

    Args:
        rooms: one per sequence.
        verify_length: draft tokens to verify a round and sequence; 0 decodes plainly.
        budget: rows of the step that drafts may take together.

    Returns:
        One length per room; their sum is at most `budget`, and where it binds the longest are cut first.
    """
    return level([min(room.proposed, wanted(room.left, room.cap, verify_length)) for room in rooms], budget)


def level(demands: Sequence[int], budget: int) -> list[int]:
    """Shares out `budget` so that the smallest share is as large as possible (max-min fair), whole numbers.

    No share exceeds its demand. What does not divide goes to the first ones.
    """
    shares = [0] * len(demands)
    hungry = [index for index, demand in enumerate(demands) if demand > 0]
    budget = max(0, budget)
    while hungry and budget:
        share = max(1, budget // len(hungry))
        for index in hungry[:budget]:
            given = min(share, demands[index] - shares[index])
            shares[index] += given
            budget -= given
        hungry = [index for index in hungry if shares[index] < demands[index]]
    return shares
