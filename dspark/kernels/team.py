"""Runs compiled code on the threads that torch computes with.

Torch's OpenMP runtime keeps one team of threads for each thread that opens parallel regions. Code run by that team
finds it awake, and no second team competes for the cores.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

__all__ = ["alone", "available", "barrier", "noting", "run", "settle"]


def available() -> bool:
    """Whether torch's OpenMP can be reached: GNU's, or LLVM's and Intel's, which have GNU's entry points too."""
    return _parallel() is not None


def run(function: int, arguments: ctypes.Structure) -> None:
    """Have every thread of the team call the compiled `function` with the address of `arguments`; returns after all."""
    _note(function, arguments)
    parallel = _parallel()
    assert parallel is not None  # `available` was asked
    parallel(function, ctypes.addressof(arguments), torch.get_num_threads(), 0)


def alone(function: int, arguments: ctypes.Structure) -> None:
    """Call it in this thread: for work that is done sooner than a team is told of it."""
    _note(function, arguments)
    _FUNCTION(function)(ctypes.addressof(arguments))


def settle() -> bool:
    """Give each thread of this thread's team a core of its own, for good; whether that was done.

    Otherwise the system may wake two of them on one core and see only milliseconds later that another stands idle. What
    this thread starts from then on inherits its core, so nothing is done in the main thread, whose cores stand for the
    program's. Nor is it where there are more or fewer cores, and it is not for teams that a library runs in part: who
    is left out ends, and comes back with this thread's core.
    """
    if getattr(_OWN, "settled", False):
        return True
    parallel = _parallel()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux has it
    here = threading.current_thread() is threading.main_thread()
    if parallel is None or here or len(cores) != torch.get_num_threads():
        return False
    place = ctypes.CDLL(None).omp_get_thread_num
    moved: list[int] = []

    def move(_: int) -> None:
        os.sched_setaffinity(0, {cores[place()]})
        moved.append(place())

    callback = _FUNCTION(move)  # what it raises is told on stderr
    parallel(ctypes.cast(callback, ctypes.c_void_p).value or 0, 0, len(cores), 0)
    settled = _OWN.settled = len(moved) == len(cores)
    return settled


@contextmanager
def noting() -> Iterator[list[tuple[int, bytes]]]:
    """What this thread runs inside the block: functions, and their arguments as they were before."""
    calls: list[tuple[int, bytes]] = []
    _OWN.calls = calls
    try:
        yield calls
    finally:
        _OWN.calls = None


def _note(function: int, arguments: ctypes.Structure) -> None:
    if (calls := getattr(_OWN, "calls", None)) is not None:
        calls.append((function, bytes(arguments)))


_OWN = threading.local()
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def barrier() -> int:
    """The address of what a team's threads call to wait for each other."""
    return ctypes.cast(ctypes.CDLL(None).GOMP_barrier, ctypes.c_void_p).value or 0


@lru_cache(maxsize=1)
def _parallel() -> Callable[[int, int, int, int], None] | None:
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel  # torch's own: it is among the program's libraries by now
        barrier()
    except (AttributeError, OSError, TypeError):  # no such entry point; a system that names no whole program
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
