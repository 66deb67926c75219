"""Blocks that routers want unasked: an order a sequence, for as many tokens behind whatever features come next.

So a round's drafts begin as soon as the verify worker has sent what it committed, while the router still reads the
verdicts. Knows who is to be drafted for and who is told. A block that nobody uses any more costs its drafting once:
the router ends the orders of those it does not draft for any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
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

    def place(self, item: ProposeItem, max_len: int, deliver: Deliver) -> None:
        """From the features after those for its committed_len on. Past `max_len` there is nothing to draft."""
        former = self._orders.get(item.key)
        latest = max(item.committed_len, former.committed_len if former is not None else 0)
        self._orders[item.key] = _Order(item.max_tokens, max_len, deliver, latest)

    def cancel(self, keys: Iterable[SequenceKey]) -> None:
        """Nothing comes unasked any more; harmless where nothing did."""
        for key in keys:
            self._orders.pop(key, None)

    def concerns(self, keys: Iterable[SequenceKey]) -> bool:
        """Whether one of them has an order."""
        return bool(self._orders) and any(key in self._orders for key in keys)

    def behind(self, keys: Iterable[SequenceKey], inbox: FeatureInbox) -> bool:
        """Whether one of them has features already that its order waits for."""
        return any(self._missing(key, inbox) is not None for key in keys)

    def due(self, keys: Iterable[SequenceKey], inbox: FeatureInbox) -> dict[Deliver, list[ProposeItem]]:
        """What is to be drafted now that features of these sequences have come, by whom it is for."""
        items: dict[Deliver, list[ProposeItem]] = defaultdict(list)
        for key in dict.fromkeys(keys):
            item = self._missing(key, inbox)
            if item is not None:
                order = self._orders[key]
                order.committed_len = item.committed_len
                items[order.deliver].append(item)
        return items

    def _missing(self, key: SequenceKey, inbox: FeatureInbox) -> ProposeItem | None:
        """The block behind the features that are here, if its order wants it."""
        order, anchor = self._orders.get(key), inbox.anchor(key)
        if order is None or anchor is None:
            return None
        committed_len = (inbox.length(key) or 0) + 1
        wanted = order.committed_len < committed_len < order.max_len
        return ProposeItem(key, committed_len, anchor, order.max_tokens, stay=True) if wanted else None
