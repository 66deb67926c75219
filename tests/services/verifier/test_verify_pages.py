"""Page accounting: whatever routers do, closing everything frees everything, and outputs stay right."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.verifying import Stream, garbage, make_engine, open_one

from dspark.errors import DSparkError, OutOfPages
from dspark.messages import Sampling, SequenceKey, StepItem
from services.verifier.engine import VerifyEngine

PROMPTS = [[2, *range(40, 40 + n)] for n in (1, 15, 16, 17, 40)]


@pytest.fixture(scope="module")
def engine(tiny_gemma: Path) -> VerifyEngine:
    return make_engine(tiny_gemma, pages=40)


class Player:
    """A careless router: opens, steps, cancels and repeats at random."""

    def __init__(self, engine: VerifyEngine, rng: random.Random) -> None:
        self.engine, self.rng = engine, rng
        self.streams: dict[str, Stream] = {}
        self.refused = 0

    def play(self) -> None:
        action = self.rng.choice(["open", "step", "step", "step", "close", "nonsense"])
        getattr(self, action)()

    def open(self) -> None:
        name = f"s{self.rng.randrange(8)}"
        if name in self.streams:
            self.close()
            return
        kind = Sampling(temperature=self.rng.choice([0.0, 1.0]), seed=1)
        try:
            self.streams[name] = Stream(
                self.engine,
                name,
                self.rng.choice(PROMPTS),
                new=self.rng.choice([2, 20, 60]),
                sampling=kind,
                drafts=garbage(self.rng.randrange(5)),
                piece=self.rng.choice([4, 16, 64]),
                features=self.rng.random() < 0.5,
            )
        except OutOfPages:
            self.refused += 1

    def step(self) -> None:
        chosen = [s for s in self.streams.values() if not s.done and self.rng.random() < 0.7]
        result = self.engine.step([stream.item() for stream in chosen])
        for stream, verdict in zip(chosen, result.verdicts, strict=True):
            stream.take(verdict)

    def close(self) -> None:
        if self.streams:
            stream = self.streams.pop(self.rng.choice(sorted(self.streams)))
            self.engine.close([stream.key])

    def nonsense(self) -> None:
        name = f"s{self.rng.randrange(10)}"
        (verdict,) = self.engine.step([StepItem(SequenceKey(name, self.rng.randrange(2)), 1, 9, (1,))]).verdicts
        assert verdict.error is not None
        self.engine.close([SequenceKey(name, 5)])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_page_leaks_over_random_operations(engine: VerifyEngine, seed: int) -> None:
    player = Player(engine, random.Random(seed))
    try:
        for _ in range(120):
            player.play()
    finally:
        engine.close([stream.key for stream in player.streams.values()])
    load = engine.load()
    assert load.running == 0
    assert load.free_pages == load.total_pages


def test_a_forward_that_fails_leaves_sequences_as_they_were(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    expected = Stream(engine, "a", PROMPTS[-1]).run()
    stream = Stream(engine, "b", PROMPTS[-1])
    stepper = engine._stepper
    engine._stepper = Failing()  # type: ignore[assignment]
    with pytest.raises(RuntimeError):
        engine.step([stream.item()])
    engine._stepper = stepper
    assert stream.run() == expected


class Failing:
    def run(self, work: object) -> None:
        raise RuntimeError("out of memory")


def test_refusals_are_errors_of_ours(engine: VerifyEngine) -> None:
    with pytest.raises(DSparkError):
        open_one(engine, "x", [2], new=10**6)
