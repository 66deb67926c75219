"""Which page of a layer group belongs to whom: free pages, references, and the pages kept for prefix reuse.

Plain bookkeeping without tensors. A page is free, referenced by sequences, or cached: referenced by nobody, but its
contents are known by a key and it can be had again until another sequence needs the room (least recently used first).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

from dspark.errors import InternalError

ROOT_KEY = b""


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a page: it stands for these tokens after everything that `parent`, the page before it, stands for."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(b"".join(token.to_bytes(4, "little") for token in token_ids))
    return digest.digest()


class PagePool:
    """The pages 1 … total of one layer group; page 0 is nobody's."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.generations = [0] * (total + 1)
        self._references = [0] * (total + 1)
        self._keys: list[bytes | None] = [None] * (total + 1)
        # Last in, first out: memory that nobody has touched yet is left alone for as long as it can be.
        self._free = list(range(total, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        self._listeners: list[Callable[[int], None]] = []

    @property
    def unreferenced(self) -> int:
        """Pages that no sequence holds, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds but whose contents could be reused."""
        return len(self._cached)

    def listen(self, listener: Callable[[int], None]) -> None:
        """Have `listener(page)` called whenever a page's former contents are given up."""
        self._listeners.append(listener)

    def find(self, key: bytes) -> int | None:
        """The page that holds what `key` stands for."""
        return self._index.get(key)

    def is_referenced(self, page: int) -> bool:
        """Whether some sequence holds the page."""
        return self._references[page] > 0

    def hold(self, page: int) -> None:
        """Reference a page found by its key."""
        self._cached.pop(page, None)
        self._references[page] += 1

    def allocate(self) -> int:
        """A page with unknown contents, referenced once; the caller has made sure that there is one."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page = self._cached.popitem(last=False)[0]
            self._forget(page)
        else:
            raise InternalError("no page left, though it was reserved")
        self._references[page] = 1
        self.generations[page] += 1
        for listener in self._listeners:
            listener(page)
        return page

    def release(self, page: int) -> None:
        """Give up one reference; the last one makes the page cached if it has a key, else free."""
        self._references[page] -= 1
        if self._references[page]:
            return
        if self._keys[page] is None:
            self._free.append(page)
        else:
            self._cached[page] = None

    def publish(self, page: int, key: bytes) -> None:
        """Say what a page holds, so that others can find it; the first page with a key keeps it."""
        if self._keys[page] is None and key not in self._index:
            self._keys[page] = key
            self._index[key] = page

    def drop_cached(self) -> None:
        """Forget every cached page."""
        for page in list(self._cached):
            self._forget(page)
            self._free.append(page)
        self._cached.clear()

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._index[key]
        self._keys[page] = None
