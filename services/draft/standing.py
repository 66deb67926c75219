"""Blocks that routers want unasked: an order a sequence, for as many tokens behind whatever features come next.

So a round's drafts begin as soon as the verify worker has sent what it committed, while the router still reads the
verdicts. Knows who is to be drafted for and who is told. A block that nobody uses any more costs its drafting once:
the router that lets a round pass without one ends the order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dspark.messages import ProposeItem, ProposeResult, SequenceKey
from services.draft.inbox import FeatureInbox

__all__ = ["Deliver", "StandingOrders"]

Deliver: TypeAlias = Callable[[ProposeResult], None]
"""Told of blocks that were drafted unasked; those that could not be are left out."""


@dataclass(slots=True)
class _Order:
    max_tokens: int
    max_len: int
    deliver: Deliver
    committed_len: int  # of the latest block


class StandingOrders:
    """The orders of a draft worker's sequences."""

    def __init__(self) -> None:
        self._orders: dict[SequenceKey, _Order] = {}

    def place(self, items: Iterable[ProposeItem], max_lens: Mapping[SequenceKey, int], deliver: Deliver) -> None:
        """From the features after those of these items on. Past a sequence's max_len there is nothing to draft."""
        for item in items:
            self._orders[item.key] = _Order(item.max_tokens, max_lens[item.key], deliver, item.committed_len)

    def cancel(self, keys: Iterable[SequenceKey]) -> None:
        """Nothing comes unasked any more; harmless where nothing did."""
        for key in keys:
            self._orders.pop(key, None)

    def concerns(self, keys: Iterable[SequenceKey]) -> bool:
        """Whether one of them has an order."""
        return bool(self._orders) and any(key in self._orders for key in keys)

    def due(self, keys: Iterable[SequenceKey], inbox: FeatureInbox) -> dict[Deliver, list[ProposeItem]]:
        """What is to be drafted now that features of these sequences have come, by whom it is for."""
        items: dict[Deliver, list[ProposeItem]] = defaultdict(list)
        for key in dict.fromkeys(keys):
            order, anchor = self._orders.get(key), inbox.anchor(key)
            if order is None or anchor is None:
                continue
            committed_len = (inbox.length(key) or 0) + 1
            if order.committed_len < committed_len < order.max_len:
                order.committed_len = committed_len
                items[order.deliver].append(ProposeItem(key, committed_len, anchor, order.max_tokens, stay=True))
        return items
