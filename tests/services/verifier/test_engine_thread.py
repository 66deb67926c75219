"""The queue in front of the engine: order, joined steps, background work in the gaps, faults that stay in place."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.verifying import Stream, make_engine

from dspark.errors import InternalError, Unavailable
from dspark.messages import SequenceKey, StepItem, StepResult
from services.verifier.engine import VerifyEngine
from services.verifier.thread import MOST_LESSONS, EngineThread

PROMPT = [2, *range(40, 60)]


class Held:
    """Keeps the thread busy until let go, so that calls gather behind it."""

    def __init__(self, thread: EngineThread) -> None:
        self._go, started = threading.Event(), threading.Event()

        def hold() -> None:
            started.set()
            self._go.wait()

        self._call = thread.submit(hold)
        started.wait(5)

    def let_go(self) -> None:
        self._go.set()
        self._call.result(5)


@pytest.fixture
def engine(tiny_gemma: Path) -> VerifyEngine:
    return make_engine(tiny_gemma, max_step_tokens=64)


def test_a_wait_for_other_calls_is_no_wait_for_steps(engine: VerifyEngine) -> None:
    stream = Stream(engine, "s", PROMPT, new=4)
    with EngineThread(engine) as thread:
        held = Held(thread)
        answer = thread.step([stream.item()])
        time.sleep(0.1)
        held.let_go()
        assert answer.result(5).queue_seconds < 0.05
        first, second = (thread.step([stream.item()]) for _ in range(2))  # of one sequence: one after the other
        assert second.result(5).queue_seconds >= 0.5 * first.result(5).total_seconds


def test_waiting_steps_run_as_one_and_come_back_apart(engine: VerifyEngine) -> None:
    streams = [Stream(engine, f"s{i}", [*PROMPT[: 5 + i]], new=4) for i in range(4)]
    with EngineThread(engine) as thread:
        held = Held(thread)
        answers = [thread.step([stream.item() for stream in streams[i : i + 2]]) for i in (0, 2)]
        assert thread.load().waiting == 2
        held.let_go()
        results = [answer.result(5) for answer in answers]
        assert [[v.key for v in result.verdicts] for result in results] == [
            [SequenceKey("s0", 0), SequenceKey("s1", 0)],
            [SequenceKey("s2", 0), SequenceKey("s3", 0)],
        ]
        assert results[0].total_seconds == results[1].total_seconds  # one step
        assert all(result.queue_seconds > 0 for result in results)
        assert thread.load().tokens_in_flight == 5 + 6 + 7 + 8


@pytest.mark.parametrize("second", ["same sequence", "too many rows"])
def test_steps_that_do_not_fit_together_run_after_each_other(engine: VerifyEngine, second: str) -> None:
    a, b = Stream(engine, "a", PROMPT, new=4), Stream(engine, "b", PROMPT * 3, new=4)
    item = a.item()
    with EngineThread(engine) as thread:
        held = Held(thread)
        first = thread.step([item])
        other = thread.step([item if second == "same sequence" else b.item()])
        held.let_go()
        one, two = first.result(5), other.result(5)
        assert one.verdicts[0].token is not None
        assert two.verdicts[0].error is None
        if second == "same sequence":
            assert one.verdicts == two.verdicts  # the repeat's answer, from memory
        assert one.total_seconds != two.total_seconds


def test_an_opening_between_two_steps_keeps_its_place(engine: VerifyEngine) -> None:
    order: list[str] = []
    with EngineThread(engine) as thread:
        held = Held(thread)
        calls = [thread.submit(lambda name=name: order.append(name)) for name in ("a", "b", "c")]  # type: ignore[misc]
        held.let_go()
        for call in calls:
            call.result(5)
    assert order == ["a", "b", "c"]


class Background:
    """Stands in for an engine with much background work."""

    settings = SimpleNamespace(max_step_tokens=64)

    def __init__(self, pieces: int) -> None:
        self.left = pieces
        self.log: list[str] = []

    @property
    def has_background_work(self) -> bool:
        return self.left > 0

    def run_background(self) -> None:
        self.left -= 1
        self.log.append("piece")
        if self.left == 5:
            raise RuntimeError("a fault in the background")

    def publish_due(self) -> Callable[[], None]:
        return lambda: self.log.append("told")

    def saved(self, _one: tuple[int, float], _other: tuple[int, float]) -> float:
        return 0.0

    def compute(self, items: list[StepItem]) -> tuple[StepResult, Callable[[], None]]:
        self.log.append("step")
        if not items:
            raise RuntimeError("a fault in a step")
        return StepResult(()), lambda: self.log.append("learned")


def test_verdicts_and_features_of_a_step_are_handed_over_as_one_and_in_this_order() -> None:
    engine, handed = Background(pieces=0), list[Callable[[], None]]()
    with EngineThread(engine, hand_over=handed.append) as thread:  # type: ignore[arg-type]
        held = Held(thread)
        answer = thread.step([StepItem(SequenceKey("a", 0), 1, 1)])
        answer.add_done_callback(lambda _: engine.log.append("answered"))
        behind = thread.submit(lambda: list(engine.log))
        held.let_go()
        assert behind.result(5) == ["step"]  # nothing is learned while somebody waits
        assert len(handed) == 1
        handed[0]()
        assert [entry for entry in engine.log if entry != "learned"] == ["step", "answered", "told"]
        assert answer.result(0) == StepResult((), queue_seconds=answer.result(0).queue_seconds)


def test_every_step_is_learned_of_once_however_closely_they_follow() -> None:
    engine, steps = Background(pieces=0), 3 * MOST_LESSONS
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        for _ in range(steps):
            thread.step([StepItem(SequenceKey("a", 0), 1, 1)]).result(5)
        assert engine.log.count("learned") >= steps - MOST_LESSONS - 1
        until = time.monotonic() + 5
        while engine.log.count("learned") < steps and time.monotonic() < until:
            time.sleep(0.001)
    assert engine.log.count("learned") == engine.log.count("step") == steps


def test_background_work_fills_gaps_and_is_never_starved() -> None:
    engine = Background(pieces=9)
    with EngineThread(engine) as thread:  # type: ignore[arg-type]
        while engine.left:  # nothing waits: all of it runs, a fault in one piece included
            thread.submit(lambda: None).result(5)
        assert engine.log.count("piece") == 9
        held = Held(thread)
        engine.left, engine.log = 2, []
        calls = [thread.submit(lambda: engine.log.append("call")) for _ in range(80)]
        held.let_go()
        for call in calls:
            call.result(5)
    assert "piece" in engine.log[:40]
    gaps = [i for i, entry in enumerate(engine.log) if entry == "piece"]
    assert gaps[1] - gaps[0] > 10  # one piece, then calls again


def test_a_failed_step_fails_its_calls_and_nothing_else() -> None:
    with EngineThread(Background(0)) as thread:  # type: ignore[arg-type]
        with pytest.raises(InternalError, match="a fault in a step"):
            thread.step([]).result(5)
        assert thread.submit(lambda: 7).result(5) == 7
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            thread.submit(lambda: 1 // 0).result(5)


def test_what_waits_at_the_end_is_refused(engine: VerifyEngine) -> None:
    with EngineThread(engine) as thread:
        held = Held(thread)
        waiting = thread.submit(lambda: None)
        cancelled = thread.submit(lambda: None)
        cancelled.cancel()
        threading.Timer(0.1, held.let_go).start()
    with pytest.raises(Unavailable):
        thread.submit(lambda: None).result(5)
    assert waiting.done()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that is what is tested
def test_a_thread_that_ends_unasked_says_so(engine: VerifyEngine) -> None:
    ended = threading.Event()
    with EngineThread(engine, on_end=ended.set) as thread:
        thread.submit(sys.exit)
        assert ended.wait(5)
        assert thread.failed
    with EngineThread(engine) as told:
        pass
    assert not told.failed
