"""How much of each prompt is computed beside a round."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["level"]


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
