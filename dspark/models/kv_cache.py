"""Paged keys and values of a target model, with reuse of common prefixes.

Layers form groups, full attention and sliding window, each with pages of its own and a page table per sequence. A
page holds `page_size` positions of all layers of its group. Opening a sequence reserves all it can ever need, so that
a running sequence never runs out. Rolling back is a change of length: rows past it are overwritten later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from dspark.errors import InternalError, OutOfPages
from dspark.kernels.attention import KEY_BLOCK, NULL_PAGE
from dspark.models.config import FULL, SLIDING, TargetConfig
from dspark.models.pages import ROOT_KEY, PagePool, page_key


@dataclass(eq=False, slots=True)
class CachedSequence:
    """One sequence's pages; made by `KVCache.open`.

    `computed_len` positions have valid keys and values. `pages[kind][i]` holds positions i · page_size …; it is
    `NULL_PAGE` where a sliding page was freed. A fork (`KVCache.fork`) names its `origin`.
    """

    cache: KVCache
    max_len: int
    computed_len: int = 0
    pages: dict[str, list[int]] = field(default_factory=dict)
    keys: list[bytes] = field(default_factory=list)
    closed: bool = False
    origin: CachedSequence | None = None

    @property
    def full_pages(self) -> list[int]:
        """Page ids of the full-attention group, one per page_size positions: where to keep what goes with them."""
        return self.pages[FULL]


class _Group:
    """The layers of one kind: their pages, their storage and what is promised to open sequences."""

    def __init__(self, kind: str, window: int | None, total: int) -> None:
        self.kind = kind
        self.window = window
        self.pool = PagePool(total)
        self.promised = 0
        self.storage: dict[int, torch.Tensor] = {}

    @property
    def available(self) -> int:
        """Pages that can still be promised.

        Full pages stay until the end, so a page that two sequences share counts once. Sliding pages come and go, so
        there every sequence counts with the most it can hold, shared or not.
        """
        if self.window is None:
            return self.pool.unreferenced - self.promised
        return self.pool.total - self.promised


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because masked garbage must be finite; on a CPU they take no memory until they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros((*shape, dtype.itemsize), np.uint8)).view(dtype).squeeze(-1)


class KVCache:
    """Keys and values of every layer in pages.

    `pages` of the full-attention group hold pages · page_size positions; the sliding group has `sliding_pages` (as
    many, if not given). `max_step_rows` is the most rows of one sequence in one step, and `lookahead` how many rows
    past its max_len a sequence may write (drafts that will not be needed).
    """

    def __init__(
        self,
        config: TargetConfig,
        *,
        pages: int,
        page_size: int = 16,
        dtype: torch.dtype,
        device: torch.device,
        sliding_pages: int | None = None,
        max_step_rows: int = 512,
        lookahead: int = 16,
        prefix_cache: bool = True,
    ) -> None:
        if KEY_BLOCK % page_size:
            raise InternalError(f"page_size must divide {KEY_BLOCK}, not be {page_size}")
        self.identity = object()  # no other cache's, nor a later one's, as addresses may be
        self.config = config
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.lookahead = lookahead
        self._prefix_cache = prefix_cache
        self._full = _Group(FULL, None, pages)
        self._groups = {FULL: self._full}
        if SLIDING in config.layer_types:
            assert config.sliding_window is not None
            self._groups[SLIDING] = _Group(SLIDING, config.sliding_window, sliding_pages or pages)
            self._sliding_cap = self._pages_for(config.sliding_window + max_step_rows) + 1
        shape = 2 * config.num_kv_heads, page_size * config.head_dim
        for layer, kind in enumerate(config.layer_types):
            group = self._groups[kind]
            group.storage[layer] = _zeros((shape[0], group.pool.total + 1, shape[1]), dtype, device)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layer groups that have pages."""
        return tuple(self._groups)

    @property
    def total_pages(self) -> int:
        """The most pages that one sequence could be given, in positions / page_size."""
        return max(0, self._full.pool.total - self._pages_for(self.lookahead))

    @property
    def free_pages(self) -> int:
        """A sequence whose max_len takes this many pages can be opened now."""
        free = self._full.available
        sliding = self._groups.get(SLIDING)
        if sliding is not None and sliding.available < self._sliding_cap:
            free = min(free, sliding.available)
        return max(0, free - self._pages_for(self.lookahead))

    @property
    def cached_pages(self) -> int:
        """Full-group pages that nobody holds but that a prefix could reuse."""
        return self._full.pool.cached

    def generation(self, page: int) -> int:
        """A number that changes when a full-group page is given other contents."""
        return self._full.pool.generations[page]

    def on_evict(self, listener: Callable[[int], None]) -> None:
        """Have `listener(page)` called whenever a full-group page is about to get other contents."""
        self._full.pool.listen(listener)

    def layer(self, layer: int) -> torch.Tensor:
        """A layer's storage (2 · kv_heads, pages + 1, page_size · head_dim), keys before values."""
        return self._groups[self.config.layer_types[layer]].storage[layer]

    def window(self, kind: str) -> int | None:
        """A group's sliding window, None for full attention."""
        return self._groups[kind].window

    def open(self, token_ids: Sequence[int], max_len: int, *, reuse: bool = True) -> CachedSequence:
        """A sequence with room for `max_len` tokens, its known prefix already computed (never the last token).

        Raises OutOfPages, with nothing changed, where the room is not there.
        """
        keys = self._page_keys(token_ids) if reuse and self._prefix_cache else []
        hits = self._longest_hit(keys)
        needed = self._pages_for(max_len + self.lookahead)
        self._reserve(needed, [self._found(self._full, key) for key in keys[:hits]])
        sequence = CachedSequence(self, max_len, hits * self.page_size, keys=keys[:hits])
        sequence.pages = {kind: self._hold(group, keys[:hits]) for kind, group in self._groups.items()}
        return sequence

    def extend(self, sequence: CachedSequence, length: int) -> None:
        """Make sure that positions below `length` have pages (out of the sequence's reservation)."""
        if length > sequence.max_len + self.lookahead or sequence.closed:
            raise InternalError(
                f"position {length - 1} is past the sequence's reservation of {sequence.max_len} tokens"
            )
        needed = self._pages_for(length)
        for kind, group in self._groups.items():
            pages = sequence.pages[kind]
            while len(pages) < needed:
                pages.append(group.pool.allocate())
                if group.window is None:
                    group.promised -= 1

    def commit(self, sequence: CachedSequence, token_ids: Sequence[int], computed_len: int) -> None:
        """Say that the keys and values of `token_ids[:computed_len]` are final.

        Pages full of them become reusable, and sliding pages that no later row sees are freed.
        """
        sequence.computed_len = computed_len
        if self._prefix_cache:
            self._publish(sequence, token_ids, min(computed_len, len(token_ids)) // self.page_size)
        sliding = self._groups.get(SLIDING)
        if sliding is not None:
            pages = sequence.pages[SLIDING]
            for index in range(self._first_visible(computed_len)):
                if pages[index] != NULL_PAGE:
                    sliding.pool.release(pages[index])
                    pages[index] = NULL_PAGE

    def fork(self, sequence: CachedSequence, position: int) -> CachedSequence | None:
        """As the sequence is before `position`, with a page of its own from there on; None where no page is free.

        For one step, beside the sequence's own rows: what its own page has to hold of positions before is copied as
        these rows' keys and values are written (`attention.Span`). To be given back by `join`.
        """
        if any(group.available < 1 for group in self._groups.values()):
            return None
        self.extend(sequence, position + 1)
        fork = CachedSequence(self, sequence.max_len, position, origin=sequence)
        shared = position // self.page_size
        for kind, group in self._groups.items():
            fork.pages[kind] = [*sequence.pages[kind][:shared], group.pool.allocate()]
            group.promised += group.window is not None
        return fork

    def adopt(self, fork: CachedSequence) -> None:
        """Give a fork's keys and values at its position to its origin."""
        assert fork.origin is not None
        page, at = divmod(fork.computed_len, self.page_size)
        for kind, group in self._groups.items():
            own, to = fork.pages[kind][page], fork.origin.pages[kind][page]
            for storage in group.storage.values():
                slots = storage.view(len(storage), len(storage[0]), self.page_size, -1)
                slots[:, to, at] = slots[:, own, at]

    def join(self, fork: CachedSequence) -> None:
        """Give a fork's page back."""
        for kind, group in self._groups.items():
            group.pool.release(fork.pages[kind][-1])
            group.promised -= group.window is not None

    def blank(self, sequence: CachedSequence, position: int) -> None:
        """Zero a sequence's pages from that of `position` on: for whoever wrote what means nothing, lest it is read."""
        for kind, group in self._groups.items():
            pages = [page for page in sequence.pages[kind][position // self.page_size :] if page != NULL_PAGE]
            for storage in group.storage.values():
                storage[:, pages] = 0

    def close(self, sequence: CachedSequence) -> None:
        """Give a sequence's pages and reservation back; its committed pages stay reusable. Closing twice is fine."""
        if sequence.closed:
            return
        sequence.closed = True
        needed = self._pages_for(sequence.max_len + self.lookahead)
        for kind, group in self._groups.items():
            pages = sequence.pages[kind]
            group.promised -= needed - len(pages) if group.window is None else min(needed, self._sliding_cap)
            for page in reversed(pages):  # so that the beginning of a prefix outlives its end
                if page != NULL_PAGE:
                    group.pool.release(page)

    @property
    def shares_prefixes(self) -> bool:
        """Whether committed pages become reusable now."""
        return self._prefix_cache

    @contextmanager
    def unshared(self) -> Iterator[None]:
        """Inside, nothing is reused and nothing becomes reusable: for sequences whose contents are made up."""
        shared, self._prefix_cache = self._prefix_cache, False
        try:
            yield
        finally:
            self._prefix_cache = shared

    def drop_prefixes(self) -> None:
        """Forget all reusable pages that nobody holds."""
        for group in self._groups.values():
            group.pool.drop_cached()

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def _first_visible(self, position: int) -> int:
        """Index of the first sliding page that a row at `position` or later sees."""
        window = self._groups[SLIDING].window
        assert window is not None
        return max(0, position - window + 1) // self.page_size

    def _page_keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the pages that a new sequence could reuse: the last token is always computed."""
        keys: list[bytes] = []
        for index in range((len(token_ids) - 1) // self.page_size):
            keys.append(self._key(keys, token_ids, index))
        return keys

    def _key(self, keys: list[bytes], token_ids: Sequence[int], index: int) -> bytes:
        start = index * self.page_size
        return page_key(keys[index - 1] if index else ROOT_KEY, token_ids[start : start + self.page_size])

    def _longest_hit(self, keys: list[bytes]) -> int:
        """The most leading pages whose full pages are all there, and of whose sliding pages the last window's."""
        full = 0
        while full < len(keys) and self._full.pool.find(keys[full]) is not None:
            full += 1
        sliding = self._groups.get(SLIDING)
        if sliding is None:
            return full
        run, best = 0, 0
        for index in range(full):
            run = run + 1 if sliding.pool.find(keys[index]) is not None else 0
            if run >= index + 1 - self._first_visible((index + 1) * self.page_size):
                best = index + 1
        return best

    def _reserve(self, needed: int, found: list[int]) -> None:
        revived = sum(not self._full.pool.is_referenced(page) for page in found)
        wanted = {FULL: needed - len(found) + revived}
        if SLIDING in self._groups:
            wanted[SLIDING] = min(needed, self._sliding_cap)
        for kind, count in wanted.items():
            if count > self._groups[kind].available:
                raise OutOfPages(f"{count} {kind} pages are needed, {max(0, self._groups[kind].available)} are free")
        self._full.promised += needed - len(found)
        if SLIDING in self._groups:
            self._groups[SLIDING].promised += wanted[SLIDING]

    def _found(self, group: _Group, key: bytes) -> int:
        page = group.pool.find(key)
        assert page is not None
        return page

    def _hold(self, group: _Group, keys: list[bytes]) -> list[int]:
        unseen = 0 if group.window is None else self._first_visible(len(keys) * self.page_size)
        pages = [NULL_PAGE] * unseen + [self._found(group, key) for key in keys[unseen:]]
        for page in pages[unseen:]:
            group.pool.hold(page)
        return pages

    def _publish(self, sequence: CachedSequence, token_ids: Sequence[int], complete: int) -> None:
        for index in range(len(sequence.keys), complete):
            sequence.keys.append(self._key(sequence.keys, token_ids, index))
            for kind, group in self._groups.items():
                page = sequence.pages[kind][index]
                if page != NULL_PAGE:
                    group.pool.publish(page, sequence.keys[index])
