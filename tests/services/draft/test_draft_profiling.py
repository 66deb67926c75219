"""Draft times measured through the engine: what is timed, what stays, what rides on answers."""

from pathlib import Path

import pytest
from support.drafting import attach, feed, item, key_of, make_drafter, make_engine, make_features

from dspark.costs import CostModel, CostProfile, Point, Refined
from dspark.costs.files import profiles_dir
from services.draft.engine import DraftEngine
from services.draft.ngram import PromptLookup
from services.draft.profiling import profile, rehearsal
from services.draft.serving import prepare
from services.draft.settings import Settings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))


def with_sequence(engine: DraftEngine) -> DraftEngine:
    attach(engine, key_of())
    feed(engine, key_of(), make_features(9))
    return engine


def test_requests_at_two_contexts_as_far_as_there_is_room() -> None:
    with rehearsal(make_engine(make_drafter()), 64) as timed:
        assert {context for _, context in timed.shapes} == {64, 512}
        assert [count for count, context in timed.shapes if context == 512] == [
            1,
            2,
            3,
            4,
            6,
            8,
            12,
            16,
            24,
            32,
            48,
            64,
        ]
        assert timed.time(3, 64) > 0
    with rehearsal(make_engine(make_drafter(), positions=1024), 64) as timed:
        assert max(count for count, context in timed.shapes if context == 64) == 8
        assert all(context == 64 for _, context in timed.shapes)
    with rehearsal(make_engine(make_drafter(), positions=64), 64) as timed:
        assert timed.shapes == []


def test_nothing_stays() -> None:
    engine = with_sequence(make_engine(make_drafter()))
    before, proposed = engine.load(), with_sequence(make_engine(make_drafter())).propose([item(key_of(), 10)])
    made = profile(engine, 64, fingerprint="f", choice="measure", budget_seconds=1)
    assert made is not None
    assert made.kind == "draft"
    assert engine.load() == before
    assert engine.propose([item(key_of(), 10)]).proposals == proposed.proposals
    assert engine.load().running == 1


def test_what_fails_half_way_leaves_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_drafter())
    before = engine.load()
    monkeypatch.setattr(engine, "extend", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        profile(engine, 64, fingerprint="f", choice="measure", budget_seconds=1)
    assert engine.load() == before
    assert profile(engine, 64, fingerprint="f", choice="off", budget_seconds=1) is None


def test_prompt_lookup_is_measured_too() -> None:
    engine = make_engine(PromptLookup(512))
    made = profile(engine, 0, fingerprint="f", choice="auto", budget_seconds=1)
    assert made is not None
    assert profile(engine, 0, fingerprint="f", choice="auto", budget_seconds=1) == made
    assert engine.load().free_pages == engine.load().total_pages


def test_the_worker_keeps_its_profile(tiny_gemma: Path) -> None:
    settings = Settings(drafter=Path("ngram"), target=str(tiny_gemma), store="redis://x", profile="auto")
    first, again = (prepare(settings)[0] for _ in range(2))
    assert first.costs is not None
    assert again.costs is not None
    assert again.costs.model.profile == first.costs.model.profile
    assert [path.stem for path in profiles_dir().glob("*.json")] == [first.costs.model.profile.fingerprint]
    assert prepare(settings.model_copy(update={"profile": "off"}))[0].costs is None


def test_answers_carry_what_the_costs_come_to() -> None:
    engine = with_sequence(make_engine(make_drafter()))
    plain = engine.propose([item(key_of(), 10)])
    assert (plain.fixed_seconds, plain.marginal_seconds, engine.load().observed_ratio) == (0.0, 0.0, 0.0)
    points = Point(1, 64, 1e-6), Point(8, 64, 2e-6)
    engine.costs = Refined(CostModel(CostProfile("draft", "f", points, 0.0)))
    engine.propose([item(key_of(), 10, max_tokens=2)])  # not a whole block
    engine.propose([item(key_of("nobody"), 10)])
    assert engine.costs.steps == 0
    for _ in range(20):
        result = engine.propose([item(key_of(), 10)])
    assert engine.costs.steps == 20
    assert engine.load().observed_ratio == engine.costs.ratio > 10
    assert result.fixed_seconds == engine.costs.fixed_seconds > 0
    assert result.marginal_seconds == engine.costs.marginal_seconds
