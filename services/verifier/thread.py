"""The one thread that may touch the engine, and the queue in front of it. Knows when to run what, not what it does.

Calls run in the order in which they came. Steps that wait next to each other (of several routers) run as one, since
a forward over all their rows costs less than one each and no row depends on its company; they wait for another
router's where that pays (`company.py`), overtaken by calls that are no steps. While nothing waits, the engine's
background work runs piece by piece; between two steps there is at most one piece.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog

from dspark.errors import DSparkError, InternalError, Unavailable
from dspark.messages import StepItem, StepResult, WorkerLoad
from services.verifier.answers import answers
from services.verifier.calls import Call, Waiting, load_of
from services.verifier.company import Company
from services.verifier.engine import VerifyEngine

__all__ = ["EngineThread"]

STARVED_CALLS = 32  # in a row, after which one piece of background work runs although others wait
TELLING = 0.001  # seconds in which others hear of a step before anything is learned of it
MOST_LESSONS = 16  # steps that follow each other so closely that nothing was learned of them

T = TypeVar("T")

_log = structlog.get_logger(__name__)


def _nothing() -> None:
    """The function of a call that is a step."""


def _at_once(function: Callable[[], None]) -> None:
    function()


class EngineThread:
    """Runs an engine in a thread of its own, for `with`. `submit` and `step` may be called from any thread."""

    def __init__(
        self,
        engine: VerifyEngine,
        *,
        on_end: Callable[[], None] = _nothing,
        hand_over: Callable[[Callable[[], None]], object] = _at_once,
        executor: Executor | None = None,
    ) -> None:
        """`on_end`: called in the thread as it ends, whatever ends it. `executor`: of one thread, which is to be it.

        `hand_over`: runs what tells others of a step, where they are. Given an event loop's `call_soon_threadsafe`,
        verdicts and features of a step come with one wake-up, in this order: where a drafter shares the cores, it has
        taken them as soon as features reach it, and whoever computed or sent until then is the last in line.
        """
        self.engine = engine
        self._company = Company(engine.saved, max_rows=engine.settings.max_step_tokens)
        self._on_end = on_end
        self._hand_over = hand_over
        self._calls = Waiting(engine.settings.max_step_tokens)
        self._wake = threading.Condition()
        self._stopping = False
        self._busy = 0  # calls since background work last ran
        self._lessons: list[Callable[[], None]] = []  # of steps whose verdicts are being told
        self._since: float | None = None  # when the steps that wait could have run
        self.failed = False
        """The thread has ended without being told to."""
        self._executor = executor or ThreadPoolExecutor(1, "engine")

    def __enter__(self) -> Self:
        self._ended = self._executor.submit(self._run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finishes the call that runs and refuses what still waits."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        wait([self._ended])

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queue a call of the engine."""
        return self._queue(Call(function))

    def step(self, items: Sequence[StepItem], caller: object = None) -> Future[StepResult]:
        """Queue a step. `caller`: who sends one after another, so that others' steps may wait for it; None: nobody."""
        return self._queue(Call(items=tuple(items), caller=caller))

    def leave(self, caller: object) -> None:
        """No more steps come from this caller."""
        with self._wake:
            self._company.left(caller)
            self._wake.notify_all()

    async def call(self, function: Callable[[], T]) -> T:
        """`submit`, awaited."""
        return await asyncio.wrap_future(self.submit(function))

    def load(self) -> WorkerLoad:
        """The engine's load and how many calls wait for it."""
        return replace(self.engine.load(), waiting=len(self._calls))

    def wait_empty(self, seconds: float) -> bool:
        """Wait until no sequence is open or the thread has ended, at most so long. Not for the event loop."""
        with self._wake:
            return self._wake.wait_for(lambda: self._stopping or self.engine.load().running == 0, seconds)

    def _queue(self, call: Call) -> Future[Any]:
        with self._wake:
            if self._stopping:
                call.answer.set_exception(Unavailable("this worker is stopping"))
            else:
                self._calls.add(call)
                if call.caller is not None:
                    self._company.asked(call.caller, call.load, call.queued_at)
                self._wake.notify_all()
        return call.answer

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            while calls := self._take():
                if calls[0].items is None:
                    self._execute(calls[0])
                else:
                    self._step(calls)
        finally:  # also where a fault of this module ends the thread: nobody may wait for it
            with self._wake:
                self.failed = not self._stopping
                self._stopping = True
                self._wake.notify_all()
            self._learn()
            for call in self._calls:
                _fail(call, Unavailable("this worker is stopping"))
            self._on_end()

    def _take(self) -> list[Call]:
        """The next call with what may run together with it; empty at the end. Background work runs meanwhile."""
        while True:
            with self._wake:
                self._wake.notify_all()  # whoever waits for sequences to close
                self._wake.wait_for(self._wanted, TELLING if self._lessons else None)
                if self._stopping:
                    return []
                starved = self._busy >= STARVED_CALLS and self.engine.has_background_work
                if self._calls and not starved:
                    self._busy += 1
                    return self._next()
            if self._lessons:
                self._learn()
            else:
                self._busy = 0
                self._guard(self.engine.run_background)

    def _wanted(self) -> bool:
        return bool(self._calls) or self._stopping or self.engine.has_background_work

    def _learn(self) -> None:
        """What steps taught. Done at once, it would keep the event loop from telling of them: it is all Python."""
        lessons, self._lessons = self._lessons, []
        for learn in lessons:
            self._guard(learn)

    def _next(self) -> list[Call]:
        """What runs now, off the queue: a call, or steps that run together. None at the end."""
        first = self._calls.first
        if first.items is not None:
            first = self._await_company() or self._calls.within(self._calls.group()) or first
        if self._stopping:
            return []
        taken = [first] if first.items is None else self._calls.group()
        self._calls.take(taken)
        if first.items is not None:
            self._since = None
            self._company.runs(time.perf_counter())
        return taken

    def _await_company(self) -> Call | None:
        """Returns once the steps that wait are to run, or with a call that need not wait with them."""
        now = time.perf_counter()
        self._since = now if self._since is None else self._since
        while not self._stopping and not self.engine.has_background_work:
            until = self._until(self._since, now)
            if until <= now:
                return None
            if (overtaking := self._calls.function) is not None:
                return overtaking
            self._wake.wait(until - now)
            now = time.perf_counter()
        return None

    def _until(self, since: float, now: float) -> float:
        """Until when the steps that wait go on waiting: `now` where there are some that do not fit together."""
        group = self._calls.group()
        if len(group) < len(self._calls.steps):
            return now
        try:
            return self._company.worth(load_of(group), since, now)
        except Exception:  # noqa: BLE001 - the thread must outlive any fault in it
            _log.exception("no company was sought")
            return now

    def _step(self, calls: Sequence[Call]) -> None:
        live = [call for call in calls if call.answer.set_running_or_notify_cancel()]
        began = time.perf_counter()
        try:
            result, learn = self.engine.compute([item for call in live for item in call.items or ()])
            told = answers(result, live, began)
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault in it
            _log.exception("a step failed")
            for call in live:
                call.answer.set_exception(InternalError(f"the step failed: {type(error).__name__}: {error}"))
            return
        finally:
            self._note_answered(calls)
        news: list[Callable[[], None]] = [
            partial(call.answer.set_result, own) for call, own in zip(live, told, strict=True)
        ]
        self._guard(lambda: news.append(self.engine.publish_due()))
        self._hand_over(partial(self._tell, news))
        self._lessons.append(learn)
        if len(self._lessons) > MOST_LESSONS:
            self._learn()

    def _note_answered(self, calls: Sequence[Call]) -> None:
        now = time.perf_counter()
        with self._wake:
            for call in calls:
                if call.caller is not None:
                    self._company.answered(call.caller, now)

    def _tell(self, news: Sequence[Callable[[], None]]) -> None:
        for tell in news:
            self._guard(tell)

    def _execute(self, call: Call) -> None:
        if not call.answer.set_running_or_notify_cancel():
            return
        began = time.perf_counter()
        try:
            call.answer.set_result(call.function())
        except DSparkError as error:
            call.answer.set_exception(error)
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault in it
            _log.exception("a call of the engine failed")
            call.answer.set_exception(InternalError(f"{type(error).__name__}: {error}"))
        finally:
            self._note_delay(began)

    def _note_delay(self, began: float) -> None:
        """Steps that wait did so for a call: not for steps of others, as their time in the queue is taken for."""
        now = time.perf_counter()
        with self._wake:
            for step in self._calls.steps:
                step.delayed += now - max(began, step.queued_at)

    @staticmethod
    def _guard(function: Callable[[], None]) -> None:
        """Runs what nobody waits for: a fault there is logged and must not end the thread."""
        try:
            function()
        except Exception:  # noqa: BLE001 - the thread must outlive any fault in it
            _log.exception("background work failed")


def _fail(call: Call, error: DSparkError) -> None:
    if call.answer.set_running_or_notify_cancel():
        call.answer.set_exception(error)
