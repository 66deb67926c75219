"""Routers that share a worker share its steps: who is waited for, for how long, and what it is worth."""

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from dspark.errors import Unavailable
from dspark.messages import SequenceKey, StepItem, StepResult
from services.verifier.company import AWAY, LONGEST_PAUSE, PATIENCE, Company, Load
from services.verifier.thread import EngineThread

FIXED = 0.020
FOUR: Load = 4, 100.0


class Caller:
    """Something with an identity."""


def company(saved: float = FIXED, max_rows: int = 64) -> Company:
    return Company(lambda _one, _other: saved, max_rows=max_rows)


def met(known: Company, *callers: Caller, at: float) -> None:
    """All of them have asked and are answered."""
    for caller in callers:
        known.asked(caller, FOUR, at)
    for caller in callers:
        known.answered(caller, at)


def test_a_step_waits_for_whoever_was_answered_with_it() -> None:
    known, one, other = company(), Caller(), Caller()
    met(known, one, other, at=1.0)
    known.asked(one, FOUR, 1.005)
    until = known.worth(FOUR, 1.005, 1.005)
    assert until == 1.005 + PATIENCE * FIXED
    known.asked(other, FOUR, 1.008)
    assert known.worth(FOUR, 1.005, 1.008) == 1.008  # nobody else is to come


@pytest.mark.parametrize("why", ["nothing is saved", "too many rows", "it has been away", "it is the same caller's"])
def test_a_step_does_not_wait_where_there_is_nothing_to_win(why: str) -> None:
    known, one, other = company(0.0 if why == "nothing is saved" else FIXED), Caller(), Caller()
    met(known, one, *([] if why == "it is the same caller's" else [other]), at=1.0)
    now = 1.0 + AWAY * FIXED + 0.001 if why == "it has been away" else 1.005
    known.asked(one, FOUR, now)
    rows = 61 if why == "too many rows" else 4
    assert known.worth((rows, 100.0), now, now) == now


def test_a_caller_that_has_more_steps_under_way_is_not_absent() -> None:
    known, one, other = company(), Caller(), Caller()
    known.asked(other, FOUR, 0.9)
    met(known, one, other, at=1.0)  # one of the other's two is answered
    known.asked(one, FOUR, 1.005)
    assert known.worth(FOUR, 1.005, 1.005) == 1.005


def test_a_caller_that_is_gone_is_forgotten() -> None:
    known, one, other = company(), Caller(), Caller()
    met(known, one, other, at=1.0)
    del other
    known.asked(one, FOUR, 1.005)
    assert known.worth(FOUR, 1.005, 1.005) == 1.005


def test_waiting_in_vain_is_given_up_for_ever_longer_and_taken_up_again() -> None:
    known, one, other = company(), Caller(), Caller()
    met(known, one, other, at=0.0)
    waited, now = list[int](), 0.0
    for step in range(600):  # the other comes back long after a step could wait, though never long enough to be away
        known.asked(one, FOUR, now)
        until = known.worth(FOUR, now, now)
        if until > now:
            waited.append(step)
        now = until
        known.runs(now)
        known.answered(one, now)
        known.asked(other, FOUR, now)
        known.answered(other, now)
        now += 0.001
    pauses = [later - earlier for earlier, later in itertools.pairwise(waited)]
    assert pauses[:3] == [2, 3, 5]  # from one step on, doubling
    assert pauses[-1] == LONGEST_PAUSE + 1
    met(known, one, other, at=now)
    for _ in range(LONGEST_PAUSE + 2):  # now it comes in time
        known.asked(one, FOUR, now + 0.002)
        if known.worth(FOUR, now + 0.002, now + 0.002) == now + 0.002:
            known.runs(now + 0.002)
        known.asked(other, FOUR, now + 0.004)
        known.answered(one, now := now + 0.03)
        known.answered(other, now)
    known.asked(one, FOUR, now)
    assert known.worth(FOUR, now, now) > now


def test_meeting_at_the_price_of_what_it_saves_is_given_up() -> None:
    known, one, other = company(), Caller(), Caller()
    now, waited = 0.0, 0
    met(known, one, other, at=now)
    for _ in range(100):
        known.asked(one, FOUR, now)
        late = now + 1.5 * FIXED  # within a step's patience, and later than joining it is worth
        if known.worth(FOUR, now, now) > now:
            waited += 1
            known.asked(other, FOUR, late)
            known.answered(one, now := late + FIXED)
            known.answered(other, now)
        else:
            known.runs(now)
            known.answered(one, now := now + FIXED)
            known.asked(other, FOUR, now)
            known.answered(other, now)
    assert 0 < waited < 20


# ---------------------------------------------------------------- in the engine's thread


class Toy:
    """A verifier whose steps take a fixed time, however many rows they have."""

    has_background_work = False
    settings = SimpleNamespace(max_step_tokens=64)

    def __init__(self, saved: float) -> None:
        self.steps = 0
        self.saves = saved

    def saved(self, _one: Load, _other: Load) -> float:
        return self.saves

    def step(self, _items: list[StepItem]) -> StepResult:
        self.steps += 1
        time.sleep(FIXED)
        return StepResult(())

    def publish_due(self) -> Callable[[], None]:
        return lambda: None


def two_routers(saved: float, rounds: int = 40) -> int:
    """Steps that two callers needed that take different times between one's answer and the next step."""
    engine = Toy(saved)
    with EngineThread(engine) as thread:  # type: ignore[arg-type]

        def route(caller: Caller, name: str, pause: float) -> None:
            for _ in range(rounds):
                thread.step([StepItem(SequenceKey(name, 0), 1, 1)], caller).result(10)
                time.sleep(pause)

        routers = [threading.Thread(target=route, args=(Caller(), name, p)) for name, p in (("a", 0.002), ("b", 0.006))]
        for router in routers:
            router.start()
        for router in routers:
            router.join()
    return engine.steps


def test_two_routers_meet_and_stay_together() -> None:
    assert two_routers(saved=FIXED) < 60
    assert two_routers(saved=0.0) > 70  # who does not wait, alternates


def test_a_step_that_waits_as_the_worker_stops_is_refused() -> None:
    engine, one, other = Toy(saved=0.0), Caller(), Caller()
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        for caller, name in ((one, "a"), (other, "b")):
            thread.step([StepItem(SequenceKey(name, 0), 1, 1)], caller).result(5)
        engine.saves = 60.0
        waiting = thread.step([StepItem(SequenceKey("a", 0), 2, 1)], one)
        time.sleep(0.1)
        assert not waiting.done()
    with pytest.raises(Unavailable):
        waiting.result(5)
    assert engine.steps == 2


def test_whatever_else_comes_ends_the_wait() -> None:
    engine, one, other = Toy(saved=0.0), Caller(), Caller()
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        for caller, name in ((one, "a"), (other, "b")):
            thread.step([StepItem(SequenceKey(name, 0), 1, 1)], caller).result(5)
        engine.saves = 60.0
        waiting = thread.step([StepItem(SequenceKey("a", 0), 2, 1)], one)
        thread.submit(lambda: None)
        assert waiting.result(5) is not None
