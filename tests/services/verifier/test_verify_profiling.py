"""Step times measured through the engine: what is timed, what stays, what rides on answers."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs
from support.verifying import Stream, make_tap, open_one, step_one
from torch import device, float32

from dspark.costs import CostModel, CostProfile, Point, Refined
from dspark.costs.files import profiles_dir
from dspark.kernels import select_kernels
from dspark.messages import OpenSequence, Sampling, SequenceKey, StepItem, StepResult
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel, load_target
from services.verifier.engine import EngineSettings, VerifyEngine
from services.verifier.profiling import Rehearsal, profile
from services.verifier.sequences import Work, step_shape
from services.verifier.settings import Settings
from services.verifier.thread import EngineThread
from services.verifier.worker import prepare

CPU = device("cpu")
BURSTS = 4  # of other work on the machine, each of which may have a kept profile measured anew


class Rig:
    """A worker's engine on a model and cache, and a rehearsal beside it."""

    def __init__(self, path: Path, *, pages: int = 200, most: int = 64) -> None:
        self.model: TargetModel = load_target(path, dtype=float32, device=CPU, kernels=select_kernels("auto", CPU))
        kept = self.model.kept_dtype
        self.cache = KVCache(self.model.config, pages=pages, dtype=kept, device=CPU, max_step_rows=most)
        self.settings = EngineSettings(max_step_tokens=most)
        self.engine = VerifyEngine(self.model, self.cache, self.settings)
        self.rehearsal = Rehearsal(VerifyEngine(self.model, self.cache, self.settings), self.cache)

    def profile(self, choice: str = "measure", fingerprint: str = "f", seconds: float = 0.5) -> CostProfile | None:
        return profile(
            self.model,
            self.cache,
            self.settings,
            self.engine.info,
            fingerprint=fingerprint,
            choice=choice,
            budget_seconds=seconds,
        )


@pytest.fixture(params=["tiny_gemma", "tiny_qwen"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    found: Path = request.getfixturevalue(request.param)
    return found


def test_shapes_are_those_that_fit(path: Path) -> None:
    shapes = list(Rig(path, pages=40).rehearsal.shapes())
    assert [tokens for tokens, context in shapes if context == 64] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert {context for _, context in shapes} == {64, 512}  # 2048 positions need 129 pages and more
    assert list(Rig(path, pages=4).rehearsal.shapes()) == []
    assert {context for _, context in Rig(path, pages=200).rehearsal.shapes()} <= {64, 512, 2048}


@pytest.mark.parametrize(
    ("tokens", "context", "rows"),
    [(1, 64, [1]), (3, 64, [3]), (8, 64, [4, 4]), (23, 64, [5, 5, 5, 4, 4]), (64, 512, [13, 13, 13, 13, 12])],
)
def test_tokens_are_spread_over_a_quarter_as_many_sequences_or_as_pages_allow(
    path: Path, tokens: int, context: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(path, pages=190)
    seen: list[StepItem] = []
    step = VerifyEngine.step

    def spied(engine: VerifyEngine, items: Sequence[StepItem]) -> StepResult:
        seen.extend(items)
        return step(engine, items)

    monkeypatch.setattr(VerifyEngine, "step", spied)
    assert rig.rehearsal.time(tokens, context) > 0
    assert [item.count + len(item.draft_tokens) for item in seen] == rows
    assert {item.committed_len for item in seen} == {context}


def test_nothing_stays(path: Path) -> None:
    rig = Rig(path)
    prompt = tuple(range(5, 105))
    rig.engine.register_tap(*make_tap(layers=(-1, 1)))
    Stream(rig.engine, "cached", prompt, new=4, features=True, piece=64).run()
    reference = Stream(rig.engine, "again", prompt, new=12, features=True, piece=64)
    running = SequenceKey("open", 0)
    open_one(rig.engine, "open", (3, 4, 5), new=20)
    step_one(rig.engine, "open", 3, 3)

    def state() -> tuple[object, ...]:
        free = [dict(group.pool._index) for group in rig.cache._groups.values()]
        texts = generate_latest(rig.engine.metrics.registry)
        return free, texts, rig.engine.load(), rig.cache.cached_pages, rig.cache.free_pages, rig.cache.shares_prefixes

    before = state()
    assert rig.profile() is not None
    assert state() == before
    assert rig.engine.load().total_pages == rig.cache.total_pages
    assert reference.cached == 96  # found, and whole
    expected = Stream(Rig(path).engine, "x", prompt, new=12, piece=64).run()
    assert reference.run() == expected
    step_one(rig.engine, "open", 4, 1)
    rig.engine.close([running])


def test_a_rehearsal_leaves_new_pages_as_they_were(path: Path) -> None:
    """Contexts of what other rehearsals wrote have rows of no sense, which take longer to judge."""
    rig = Rig(path, pages=190)
    for tokens, context in ((8, 64), (3, 512), (33, 64)):
        rig.rehearsal.time(tokens, context)
    layers = [rig.cache.layer(layer)[:, :-1] for layer in range(rig.cache.config.num_layers)]
    assert not any(bool(storage.any()) for storage in layers)


def test_a_full_cache_times_nothing_rather_than_take_what_prefixes_need(path: Path) -> None:
    rig = Rig(path, pages=40)
    for number in range(8):
        Stream(rig.engine, f"s{number}", [number + 3] * 90, new=2, piece=64).run()
    cached = rig.cache.cached_pages
    assert cached > 20
    shapes = list(rig.rehearsal.shapes())
    for shape in shapes:
        rig.rehearsal.time(*shape)
    assert rig.cache.cached_pages == cached
    rig.cache.drop_prefixes()
    assert len(list(rig.rehearsal.shapes())) > len(shapes)


def test_a_profile_is_measured_once_and_then_read(path: Path) -> None:
    rig = Rig(path, most=16)
    assert rig.profile("off") is None
    made = rig.profile("auto", seconds=5)
    assert made is not None
    assert {point.tokens for point in made.points if point.context == 64} == {1, 2, 3, 4, 6, 8, 12, 16}
    for _ in range(BURSTS):
        with capture_logs() as logs:
            read = rig.profile("auto")
        if all(entry["event"] != "costs measured" for entry in logs):
            break
        made = read
    assert read == made
    assert all(entry["event"] != "costs measured" for entry in logs)


def started(settings: Settings, path: Path) -> CostProfile:
    """What a worker that starts has; it is idle."""
    engine, _ = prepare(settings, path)
    assert engine.costs is not None
    assert engine.load().step_seconds == 0
    assert engine.load().free_pages == engine.load().total_pages
    return engine.costs.model.profile


def test_the_worker_keeps_one_profile_per_machine_and_settings(path: Path) -> None:
    settings = Settings(
        model=str(path), store="redis://127.0.0.1:1", pages=64, dtype="float32", max_step_tokens=8, profile="auto"
    )
    other, first = (started(own, path) for own in (settings.model_copy(update={"noise_candidates": 64}), settings))
    for _ in range(BURSTS):
        if (again := started(settings, path)) == first:
            break
        first = again
    assert again == first
    assert other.fingerprint != first.fingerprint
    assert {file.stem for file in profiles_dir().glob("*.json")} == {first.fingerprint, other.fingerprint}
    off, _ = prepare(settings.model_copy(update={"profile": "off"}), path)
    assert off.costs is None
    (profiles_dir() / f"{first.fingerprint}.json").write_text("not JSON")
    assert started(settings, path).fingerprint == first.fingerprint
    assert json.loads((profiles_dir() / f"{first.fingerprint}.json").read_text())


def flat(seconds: float) -> Refined:
    return Refined(CostModel(CostProfile("verify", "f", (Point(1, 64, seconds), Point(8, 64, 2 * seconds)), 0.0)))


def test_answers_carry_what_the_costs_come_to(path: Path) -> None:
    engine = Rig(path).engine
    open_one(engine, "a", range(3, 20))
    plain = engine.step([StepItem(SequenceKey("a", 0), 17, 17)])
    assert (plain.fixed_seconds, plain.marginal_seconds, engine.load().observed_ratio) == (0.0, 0.0, 0.0)
    engine.costs = flat(1e-6)
    results = [engine.step([StepItem(SequenceKey("a", 0), committed, 1)]) for committed in range(18, 40)]
    result, usual = results[-1], statistics.median(one.total_seconds for one in results)
    assert engine.costs.steps == 22
    assert engine.load().observed_ratio == engine.costs.ratio > 10  # no step takes a microsecond
    assert result.fixed_seconds == engine.costs.fixed_seconds > 0
    assert result.marginal_seconds == engine.costs.marginal_seconds
    assert result.fixed_seconds + result.marginal_seconds == pytest.approx(usual, rel=2)


def test_steps_inside_prompts_teach_nothing(path: Path) -> None:
    engine = Rig(path).engine
    engine.costs = flat(1e-3)
    open_one(engine, "a", range(3, 60))
    engine.step([StepItem(SequenceKey("a", 0), 57, 30)])
    engine.step([StepItem(SequenceKey("a", 0), 57, 27)])
    engine.step([StepItem(SequenceKey("nobody", 0), 57, 27)])
    assert engine.costs.steps == 0
    engine.step([StepItem(SequenceKey("a", 0), 58, 1, (5, 6, 7))])
    assert engine.costs.steps == 1


def test_the_shape_of_a_step(path: Path) -> None:
    engine = Rig(path).engine
    for name, length in (("a", 10), ("b", 30)):
        open_one(engine, name, range(3, 3 + length))
    states = [engine.find(SequenceKey(name, 0)) for name in ("a", "b")]
    one = Work(states[0], 9, 1, reaches_anchor=True, draft_tokens=(1, 2, 3))
    other = Work(states[1], 29, 1, reaches_anchor=True)
    prompt = Work(states[1], 0, 4, reaches_anchor=False)
    assert step_shape([one, other]) == (5, 20.0)
    assert step_shape([one, replace(prompt, count=1)]) == (5, 5.5)
    assert step_shape([one, prompt]) is None
    assert step_shape([]) is None


def test_callers_of_one_step_hear_of_each_others_rows(path: Path) -> None:
    engine = Rig(path).engine
    for name in ("a", "b", "c"):
        engine.open([OpenSequence(SequenceKey(name, 0), (3, 4, 5), Sampling(temperature=0.0), 20)])
    with EngineThread(engine) as thread:
        held = thread.submit(lambda: time.sleep(0.1))
        items = [StepItem(SequenceKey(name, 0), 3, 3, (1,) * drafts) for name, drafts in (("a", 0), ("b", 2), ("c", 5))]
        steps = [thread.step([item]) for item in items]
        held.result(5)
        assert [step.result(5).other_tokens for step in steps] == [13, 11, 8]
        alone = thread.step([StepItem(SequenceKey("a", 0), engine.find(SequenceKey("a", 0)).committed_len, 1)])
        assert alone.result(5).other_tokens == 0
