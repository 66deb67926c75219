"""Who gets which features: subscriptions of draft workers, and the bounded queue of each worker's stream.

After every step the feed pushes newly committed positions to whoever subscribed, those of held sequences later. Nothing
is kept twice: a stream whose queue is full is left behind, its features stay in their pages, and the feed goes on from
the first position not yet sent once there is room. So the verifier never waits for a drafter, and a slow drafter costs
one bounded queue.

Beside the features go the committed ids that follow each position. A subscription to no tap (`IDS_ONLY`) gets nothing
else; ids are always known, so nothing is ever recomputed for it.

What a subscriber is told by `FeatureBlock.error` (then `count` is 0 and `start` the first position concerned):
`FeaturesMissing`: these positions are being recomputed and will follow, the subscription stays. Anything else ends it:
`UnknownSequence` (never opened, or closed), `StaleMessage` (another epoch), `Mismatch` (unknown tap), `InvalidRequest`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dspark.errors import DSparkError, FeaturesMissing, InvalidRequest, Mismatch, UnknownSequence
from dspark.messages import FeatureBlock, SequenceKey
from services.verifier.features import FeatureStore
from services.verifier.sequences import SequenceState, describe

__all__ = ["IDS_ONLY", "FeatureStream", "Feed", "flush", "refused"]

IDS_ONLY = ""
PIECE_BYTES = 1 << 20
MESSAGE_BYTES = 2 << 20

_ID_BYTES = 4


class FeatureStream:
    """One draft worker's queue: filled by the engine's thread, emptied by the event loop."""

    def __init__(self, *, limit_bytes: int, on_blocks: Callable[[], None], on_room: Callable[[], None]) -> None:
        """`on_blocks`: called by `flush`; `on_room`: when a queue that was full is half empty again."""
        self._limit = limit_bytes
        self._on_blocks = on_blocks
        self._on_room = on_room
        self._lock = threading.Lock()
        self._blocks: deque[FeatureBlock] = deque()
        self._bytes = 0
        self._refused = False

    @property
    def queued_bytes(self) -> int:
        """Bytes of features and ids waiting to be sent."""
        return self._bytes

    def has_room(self) -> bool:
        """Whether another piece may be queued; if not, `on_room` will be called."""
        with self._lock:
            self._refused = self._bytes >= self._limit
            return not self._refused

    def put(self, block: FeatureBlock) -> None:
        """Queue a block; `flush` follows. One may come over the limit after `has_room`; errors always fit."""
        with self._lock:
            self._blocks.append(block)
            self._bytes += _size(block)

    def flush(self) -> None:
        """Something was queued, and no more comes for now."""
        self._on_blocks()

    def take(self) -> list[FeatureBlock]:
        """The oldest blocks, a message of them."""
        blocks: list[FeatureBlock] = []
        with self._lock:
            taken = 0
            while self._blocks and taken < MESSAGE_BYTES:
                blocks.append(self._blocks.popleft())
                taken += _size(blocks[-1])
            resume = self._count(-taken)
        if resume:
            self._on_room()
        return blocks

    def drop(self, key: SequenceKey) -> None:
        """Forget what is queued for a sequence: nobody wants it any more, or it is asked for from elsewhere."""
        with self._lock:
            dropped = sum(_size(block) for block in self._blocks if block.key == key)
            self._blocks = deque(block for block in self._blocks if block.key != key)
            resume = self._count(-dropped)
        if resume:
            self._on_room()

    def _count(self, change: int) -> bool:
        """Whether the feed, once refused, may go on."""
        self._bytes += change
        resume = self._refused and self._bytes <= self._limit // 2
        self._refused = self._refused and not resume
        return resume


@dataclass(slots=True)
class Subscription:
    """One sequence on one stream, and the first position not yet sent."""

    stream: FeatureStream
    tap_id: str
    position: int
    told_missing: bool = False


class Feed:
    """All subscriptions of a verify worker. For the engine's thread; sequences come in as arguments."""

    def __init__(self, features: FeatureStore, want: Callable[[SequenceState], None]) -> None:
        """`want`: asks for the recomputation of what a sequence lacks."""
        self._features = features
        self._want = want
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._filled: set[FeatureStream] = set()

    @property
    def taps_in_use(self) -> frozenset[str]:
        """Taps that somebody reads now."""
        used = {s.tap_id for subscriptions in self._subscriptions.values() for s in subscriptions}
        return frozenset(used - {IDS_ONLY})

    def subscribe(self, stream: FeatureStream, state: SequenceState, tap_id: str, position: int) -> None:
        """Send features of a sequence from `position` on. Replaces an earlier subscription of the same stream."""
        _check(state, tap_id, position, self._features)
        self.unsubscribe(stream, state.key)
        subscription = Subscription(stream, tap_id, position)
        self._subscriptions.setdefault(state.key.sequence_id, []).append(subscription)
        self._send(subscription, state)
        self.flush()

    def unsubscribe(self, stream: FeatureStream, key: SequenceKey) -> None:
        """Stop sending a sequence's features to a stream; harmless where there is no subscription."""
        kept = [s for s in self._subscriptions.pop(key.sequence_id, ()) if s.stream is not stream]
        stream.drop(key)
        if kept:
            self._subscriptions[key.sequence_id] = kept

    def push(self, state: SequenceState) -> None:
        """Queue what is new of a sequence for everybody who wants it. It leaves with the next `flush`."""
        for subscription in self._subscriptions.get(state.key.sequence_id, ()):
            self._send(subscription, state)

    def flush(self) -> None:
        """Let go what was queued: one message for many sequences costs little more than one for each."""
        flush(self.filled())

    def filled(self) -> Iterable[FeatureStream]:
        """Streams with something in the queue that they have not been told of; whoever asks tells them (`flush`)."""
        filled, self._filled = self._filled, set()
        return filled

    def followed(self, stream: FeatureStream) -> list[str]:
        """Sequences that a stream is subscribed to."""
        return [sid for sid, own in self._subscriptions.items() if any(s.stream is stream for s in own)]

    def end(self, state: SequenceState) -> None:
        """The sequence is closed: tell its subscribers."""
        for subscription in self._subscriptions.pop(state.key.sequence_id, ()):
            subscription.stream.drop(state.key)
            self._put(subscription.stream, refused(state.key, UnknownSequence(f"{describe(state.key)} was closed")))

    def _put(self, stream: FeatureStream, block: FeatureBlock) -> None:
        stream.put(block)
        self._filled.add(stream)

    def _send(self, subscription: Subscription, state: SequenceState) -> None:
        step = self._positions_of_a_piece(subscription.tap_id)
        while subscription.position < state.offered_len and subscription.stream.has_room():
            start = subscription.position
            end = self._known_until(subscription, state, min(start + step, state.offered_len))
            if end == start:
                self._missing(subscription, state)
                return
            subscription.position = end
            self._put(subscription.stream, self._block(subscription.tap_id, state, start, end))

    def _positions_of_a_piece(self, tap_id: str) -> int:
        row = _ID_BYTES if tap_id == IDS_ONLY else 2 * self._features.info(tap_id).feature_size
        return max(1, PIECE_BYTES // row)

    def _known_until(self, subscription: Subscription, state: SequenceState, end: int) -> int:
        if subscription.tap_id == IDS_ONLY:
            return end
        return self._features.known_until(subscription.tap_id, state.cached.full_pages, subscription.position, end)

    def _block(self, tap_id: str, state: SequenceState, start: int, end: int) -> FeatureBlock:
        data = b"" if tap_id == IDS_ONLY else self._features.read(tap_id, state.cached.full_pages, start, end)
        ids = tuple(state.token_ids[start + 1 : end + 1])
        return FeatureBlock(state.key, start, end - start, data, token_ids=ids)

    def _missing(self, subscription: Subscription, state: SequenceState) -> None:
        self._want(state)
        if not subscription.told_missing:
            subscription.told_missing = True
            error = FeaturesMissing(
                f"{describe(state.key)}: features from {subscription.position} are being recomputed"
            )
            self._put(subscription.stream, refused(state.key, error, subscription.position))


def flush(streams: Iterable[FeatureStream]) -> None:
    """Tell them that something was queued. Any thread may."""
    for stream in streams:
        stream.flush()


def refused(key: SequenceKey, error: DSparkError, start: int = 0) -> FeatureBlock:
    """The answer that carries no features."""
    return FeatureBlock(key, start, 0, error=error)


def _size(block: FeatureBlock) -> int:
    return len(block.data) + _ID_BYTES * len(block.token_ids)


def _check(state: SequenceState, tap_id: str, position: int, features: FeatureStore) -> None:
    if not state.request.features:
        raise InvalidRequest(f"{describe(state.key)} was opened without features")
    if tap_id != IDS_ONLY and tap_id not in features.tap_ids:
        raise Mismatch(f"tap {tap_id[:12]!r} is not registered here")
    if position >= state.request.max_len:
        raise InvalidRequest(f"from_position {position} is past max_len {state.request.max_len}")
