"""Memory of files that are mapped: giving it back to the system once most of a file has been copied elsewhere.

Pages of a mapped file stay counted to a process that has read them. Where a model's weights have been laid out anew,
only single rows of the file are read from then on. Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["let_go"]

_RANDOM, _DONT_NEED = 1, 4  # advice of madvise(2)


def let_go(paths: Iterable[Path]) -> None:
    """Take these files' pages off this process, and read no further pages around the ones it asks for.

    Mappings stay valid: what is read again comes from the system's file cache. For files that nobody writes to.
    """
    if sys.platform != "linux":
        return
    names = {str(path.resolve()) for path in paths}
    system = ctypes.CDLL(None)
    for start, length in list(_mappings(names)):
        for advice in (_DONT_NEED, _RANDOM):
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _mappings(names: set[str]) -> Iterator[tuple[int, int]]:
    """Start and length of what this process maps of the named files: file pages only, never memory of its own."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *name = line.split(maxsplit=5)
        if name and inode != "0" and name[0] in names:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield start, end - start
