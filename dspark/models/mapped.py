"""Memory of files that are mapped: giving it back to the system once most of a file has been copied elsewhere.

Pages of a mapped file stay counted to a process that has read them. Where a model's weights have been laid out anew,
only single rows of the file are read from then on. Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

__all__ = ["let_go", "let_go_of", "read_ahead"]

_RANDOM, _SEQUENTIAL, _DONT_NEED = 1, 2, 4  # advice of madvise(2)


def let_go(paths: Iterable[Path]) -> None:
    """Take these files' pages off this process, and read no further pages around the ones it asks for.

    Mappings stay valid: what is read again comes from the system's file cache. For files that nobody writes to.
    """
    if sys.platform != "linux":
        return
    names = {str(path.resolve()) for path in paths}
    _advise(lambda name, _start, _end: name in names, _DONT_NEED, _RANDOM)


def let_go_of(tensor: torch.Tensor) -> None:
    """`let_go` of the file that a tensor is mapped from; of one in memory nothing happens."""
    _advise_on(tensor, _DONT_NEED, _RANDOM)


def read_ahead(tensor: torch.Tensor) -> None:
    """Have the system read ahead of who reads the file that a tensor is mapped from, until it is let go of."""
    _advise_on(tensor, _SEQUENTIAL)


def _advise_on(tensor: torch.Tensor, *advices: int) -> None:
    at = tensor.data_ptr()
    if sys.platform == "linux":
        _advise(lambda _name, start, end: start <= at < end, *advices)


def _advise(concerned: Callable[[str, int, int], bool], *advices: int) -> None:
    system = ctypes.CDLL(None)
    for start, end in [(start, end) for name, start, end in _mappings() if concerned(name, start, end)]:
        for advice in advices:
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _mappings() -> Iterator[tuple[str, int, int]]:
    """What this process maps of files, by name, start and end: never memory of its own."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *name = line.split(maxsplit=5)
        if name and inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield name[0], start, end
