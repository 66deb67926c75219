"""Runs compiled code on the threads that torch computes with.

Torch's OpenMP runtime keeps one team of threads for each thread that opens parallel regions. Code run by that team
finds it awake, and no second team competes for the cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch

__all__ = ["alone", "available", "run"]


def available() -> bool:
    """Whether torch's OpenMP can be reached: GNU's, or LLVM's and Intel's, which have GNU's entry points too."""
    return _parallel() is not None


def run(function: int, arguments: ctypes.Structure) -> None:
    """Have every thread of the team call the compiled `function` with the address of `arguments`; returns after all."""
    parallel = _parallel()
    assert parallel is not None  # `available` was asked
    parallel(function, ctypes.addressof(arguments), torch.get_num_threads(), 0)


def alone(function: int, arguments: ctypes.Structure) -> None:
    """Call it in this thread: for work that is done sooner than a team is told of it."""
    _FUNCTION(function)(ctypes.addressof(arguments))


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _parallel() -> Callable[[int, int, int, int], None] | None:
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel  # torch's own: it is among the program's libraries by now
    except (AttributeError, OSError, TypeError):  # no such entry point; a system that names no whole program
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
