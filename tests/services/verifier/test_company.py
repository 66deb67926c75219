"""Routers that share a worker share its steps: who is waited for, for how long, and what it is worth."""

import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.verifying import make_engine

from dspark.costs import CostModel, CostProfile, Point, Refined
from dspark.errors import Unavailable
from dspark.messages import SequenceKey, StepItem, StepResult, Verdict, WorkerLoad
from dspark.rpc.codec import step_call
from dspark.v1.verifier_pb2 import VerifierRequest
from services.verifier.company import AWAY, LONGEST_PAUSE, PATIENCE, Company, Load
from services.verifier.session import RouterSession
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

    def compute(self, items: list[StepItem]) -> tuple[StepResult, Callable[[], None]]:
        self.steps += 1
        time.sleep(FIXED)
        return StepResult(tuple(Verdict(item.key, 1, token=5) for item in items)), lambda: None

    def run_background(self) -> None:
        self.has_background_work = False

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
    assert two_routers(saved=FIXED) < 0.75 * two_routers(saved=0.0)  # who does not wait, alternates


def waits_for(other: Caller, thread: EngineThread, engine: Toy) -> Future[StepResult]:
    """A step of one caller that waits a minute or more for the other, who has been answered."""
    one = Caller()
    for caller, name in ((one, "a"), (other, "b")):
        thread.step([StepItem(SequenceKey(name, 0), 1, 1)], caller).result(5)
    engine.saves = 60.0
    waiting = thread.step([StepItem(SequenceKey("a", 0), 2, 1)], one)
    time.sleep(0.1)
    assert not waiting.done()
    return waiting


def test_a_step_that_waits_as_the_worker_stops_is_refused() -> None:
    engine, other = Toy(saved=0.0), Caller()
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        waiting = waits_for(other, thread, engine)
    with pytest.raises(Unavailable):
        waiting.result(5)
    assert engine.steps == 2


def test_other_calls_overtake_a_step_that_waits() -> None:
    engine, other = Toy(saved=0.0), Caller()
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        waiting = waits_for(other, thread, engine)
        thread.submit(lambda: None).result(5)
        assert not waiting.done()
        engine.has_background_work = True
        thread.submit(lambda: None).result(5)
        assert waiting.result(5) is not None  # nor does it keep the engine from what it has to do


def test_a_step_does_not_wait_for_a_session_that_has_ended() -> None:
    engine, other = Toy(saved=0.0), Caller()
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        waiting = waits_for(other, thread, engine)
        thread.leave(other)
        assert waiting.result(5) is not None


def test_what_a_step_came_after_runs_before_it_also_where_steps_join() -> None:
    engine, one, other = Toy(saved=0.0), Caller(), Caller()
    order, go = list[str](), threading.Event()
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        thread.submit(go.wait)
        first = thread.step([StepItem(SequenceKey("a", 0), 1, 1)], one)
        first.add_done_callback(lambda _: order.append("steps"))
        thread.submit(lambda: order.append("opened"))
        second = thread.step([StepItem(SequenceKey("b", 0), 1, 1)], other)
        go.set()
        assert second.result(5) is not None
        assert first.result(5) is not None
    assert order == ["opened", "steps"]
    assert engine.steps == 1


# ---------------------------------------------------------------- around it


class Recorder:
    """Stands in for an engine's thread: who sent steps, and who has left."""

    def __init__(self) -> None:
        self.callers: list[object] = []
        self.gone: list[object] = []

    def step(self, _items: object, caller: object) -> Future[StepResult]:
        self.callers.append(caller)
        answer: Future[StepResult] = Future()
        answer.set_result(StepResult(()))
        return answer

    def leave(self, caller: object) -> None:
        self.gone.append(caller)

    def submit(self, _function: Callable[[], None]) -> Future[None]:
        return Future()

    def load(self) -> WorkerLoad:
        return WorkerLoad()


async def test_a_session_is_who_its_steps_come_from() -> None:
    thread: Any = Recorder()
    session = RouterSession(thread)

    async def requests() -> AsyncIterator[VerifierRequest]:
        yield step_call([StepItem(SequenceKey("a", 0), 1, 1)])

    await session.read(requests())
    assert len([reply async for reply in session.replies()]) == 1
    assert (thread.callers, thread.gone) == ([session], [])
    session.end()
    assert thread.gone == [session]


def test_what_a_joined_step_saves_is_what_is_fixed_in_one(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    assert engine.saved((4, 64.0), (4, 64.0)) == 0.0  # nothing is known
    points = tuple(Point(rows, 64, FIXED + 0.001 * rows) for rows in (1, 16, 64))
    engine.costs = Refined(CostModel(CostProfile("verify", "toy", points, 0.0)))
    assert engine.saved((4, 64.0), (12, 64.0)) == pytest.approx(FIXED)
    cliff = tuple(Point(rows, 64, seconds) for rows, seconds in ((1, 0.001), (4, 0.1), (64, 0.1)))
    engine.costs = Refined(CostModel(CostProfile("verify", "toy", cliff, 0.0)))
    assert engine.saved((1, 64.0), (4, 64.0)) == pytest.approx(0.001)  # no more than the shorter takes
