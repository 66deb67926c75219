"""A team's threads: each on a core of its own where there are as many."""

import ctypes
import os
import threading

import pytest
import torch

from dspark.kernels import team

pytestmark = pytest.mark.skipif(
    not team.available() or not hasattr(os, "sched_setaffinity"), reason="no team to be had, or no cores to choose"
)

Cores = list[frozenset[int]]


class Nothing(ctypes.Structure):
    """No arguments."""


def cores_of_team() -> Cores:
    """Where each thread of the present thread's team may run."""
    found: Cores = []
    look = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(frozenset(os.sched_getaffinity(0))))
    team.run(ctypes.cast(look, ctypes.c_void_p).value or 0, Nothing())
    return found


def settled(threads: int) -> tuple[bool, Cores]:
    """What settling a team of so many gives, and where its threads may run then; in a thread that ends with this."""
    before = torch.get_num_threads()
    done: list[bool] = []
    cores: Cores = []

    def work() -> None:
        torch.set_num_threads(threads)
        done.append(team.settle())
        cores.extend(cores_of_team())

    thread = threading.Thread(target=work)
    try:
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    return done[0], cores


def test_threads_settle_each_on_its_own_core() -> None:
    here = os.sched_getaffinity(0)
    done, cores = settled(len(here))
    assert done
    assert sorted(cores, key=min) == [frozenset({core}) for core in sorted(here)]
    assert os.sched_getaffinity(0) == here


def test_they_stay_where_they_are_if_cores_and_threads_differ() -> None:
    here = frozenset(os.sched_getaffinity(0))
    done, cores = settled(len(here) + 1)
    assert not done
    assert cores == [here] * (len(here) + 1)


def test_the_main_thread_has_no_team_that_settles() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        assert not team.settle()
    finally:
        torch.set_num_threads(threads)
