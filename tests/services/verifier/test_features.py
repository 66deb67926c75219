"""Features: what is computed equals the formula on transformers' hidden states, and who wants it gets all of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support import kernels as choices
from support.drafting import make_drafter
from support.reading import Reader, close, reference
from support.verifying import Stream, drive, garbage, make_engine, make_tap, open_one, oracle, signed, step_one

from dspark.errors import (
    DSparkError,
    FeaturesMissing,
    InvalidRequest,
    Mismatch,
    Overloaded,
    StaleMessage,
    UnknownSequence,
)
from dspark.kernels import TORCH
from dspark.messages import OpenSequence, Sampling, SequenceKey, TapInfo
from services.verifier.taps import Tap

PROMPT = [2, *range(40, 75), 9, 9, 17, 300, 41]


TAPS = [
    make_tap(),
    make_tap(bias=True, normalize_inputs=True, seed=6),
    make_tap(layers=(2,), size=8, seed=7),
]


@pytest.mark.parametrize("model", ["tiny_gemma", "tiny_qwen"])
@pytest.mark.parametrize("piece", [512, 7])
def test_features_are_the_formula_on_the_target_s_states(
    request: pytest.FixtureRequest, model: str, piece: int
) -> None:
    path: Path = request.getfixturevalue(model)
    engine = make_engine(path)
    taps = [tap for tap in TAPS if max(tap[0].layer_ids) < engine.info.num_layers - 1]
    readers = [Reader(engine) for _ in taps]
    for info, tensors in taps:
        engine.register_tap(info, tensors)
    stream = Stream(engine, "a", PROMPT, drafts=garbage(3), piece=piece, features=True)
    for reader, (info, _) in zip(readers, taps, strict=True):
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    while not stream.done:
        stream.take(engine.step([stream.item()]).verdicts[0])
    engine.publish()
    for reader, (info, tensors) in zip(readers, taps, strict=True):
        rows = reader.rows(stream.key, info.feature_size)
        assert len(rows) == len(stream.ids) - 1  # positions 0 … N - 2
        assert close(rows, reference(path, stream.ids[:-1], info, tensors))


def test_features_do_not_depend_on_the_batch(tiny_gemma: Path) -> None:
    info, tensors = TAPS[0]
    found = []
    for piece, others in ((512, 0), (3, 4)):
        engine = make_engine(tiny_gemma, prefix_cache=False)
        engine.register_tap(info, tensors)
        stream = Stream(engine, "a", PROMPT, piece=piece, features=True, drafts=garbage(others))
        crowd = [Stream(engine, f"o{i}", [2, 7 + i, 9], drafts=garbage(i)) for i in range(others)]
        reader = Reader(engine)
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
        drive(engine, [stream, *crowd], close=False)
        found.append(reader.rows(stream.key, info.feature_size))
    assert torch.equal(*found)


def test_a_step_leaves_one_message_whatever_the_number_of_sequences(tiny_gemma: Path) -> None:
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    crowd = [Stream(engine, f"o{i}", [2, 7 + i, 9], features=True) for i in range(5)]
    for stream in crowd:
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    for _ in range(3):
        reader.read()
        reader.woken = 0
        for stream, verdict in zip(crowd, engine.step([one.item() for one in crowd]).verdicts, strict=True):
            stream.take(verdict)
        assert not reader.stream.take()
        engine.publish()
        assert reader.woken == 1
        assert {block.key for block in reader.stream.take()} == {stream.key for stream in crowd}


def test_features_come_with_prefix_cached_pages(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    Stream(engine, "first", PROMPT, features=True).run()
    stream = Stream(engine, "again", PROMPT, features=True)
    assert stream.cached >= 32
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, info.tap_id, 5)
    (block,) = reader.read()
    assert (block.start, block.count) == (5, stream.cached - 5)
    assert not engine.has_background_work
    reader.log.clear()
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    drive(engine, [stream], close=False)
    rows = reader.rows(stream.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, stream.ids[:-1], info, tensors))


def test_a_recycled_page_forgets_its_features(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, pages=9, prefix_cache=False)
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    Stream(engine, "with", PROMPT, features=True, new=60).run()
    open_one(engine, "without", PROMPT[::-1], features=False, new=60)
    step_one(engine, "without", len(PROMPT), len(PROMPT))
    pages = engine._sequences["without"].cached.full_pages
    assert engine._features.known_until(info.tap_id, pages, 0, len(PROMPT)) == 0


# ---------------------------------------------------------------- recomputation


@pytest.mark.parametrize("model", ["tiny_gemma", "tiny_qwen"])
def test_a_tap_registered_late_is_recomputed_in_pieces(request: pytest.FixtureRequest, model: str) -> None:
    path: Path = request.getfixturevalue(model)
    engine = make_engine(path, backfill_rows=16)
    prompt = PROMPT * 2
    plain = Stream(engine, "plain", prompt, sampling=Sampling(seed=1)).run()
    stream = Stream(engine, "a", [4, *prompt], sampling=Sampling(seed=1), features=True)
    for _ in range(5):
        stream.take(engine.step([stream.item()]).verdicts[0])
    info, tensors = make_tap(layers=(-1, 1))
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    free = engine.load().free_pages
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    (error,) = reader.errors()
    assert isinstance(error, FeaturesMissing)
    pieces = 0
    while engine.has_background_work:
        stream.take(engine.step([stream.item()]).verdicts[0])  # the stream goes on meanwhile
        engine.run_background()
        pieces += 1
    assert pieces == -(-(len(prompt) + 5) // 16)
    drive(engine, [stream], close=False)
    rows = reader.rows(stream.key, info.feature_size)
    assert close(rows, reference(path, stream.ids[:-1], info, tensors))
    assert [type(block.error) for block in reader.log if block.error] == [FeaturesMissing]
    assert engine.load().free_pages == free
    engine.close([stream.key])
    assert engine.load().free_pages == engine.load().total_pages
    assert plain != stream.output
    assert Stream(engine, "b", [4, *prompt], sampling=Sampling(seed=1)).run() == stream.output


def test_a_cached_page_without_features_is_recomputed(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    Stream(engine, "first", PROMPT, features=False).run()
    stream = Stream(engine, "again", PROMPT, features=True)
    assert stream.cached >= 32
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    assert isinstance(reader.errors()[0], FeaturesMissing)
    while engine.has_background_work:
        engine.run_background()
    assert len(reader.rows(stream.key, info.feature_size)) == stream.cached
    third = Stream(engine, "third", PROMPT, features=True)  # shares the pages that were filled
    engine.subscribe(reader.stream, third.key, info.tap_id, 0)
    assert len(reader.rows(third.key, info.feature_size)) == third.cached


def test_closing_ends_a_recomputation(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, backfill_rows=8)
    stream = Stream(engine, "a", PROMPT, features=True)
    stream.take(engine.step([stream.item()]).verdicts[0])
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    engine.run_background()
    engine.close([stream.key])
    assert not engine.has_background_work
    assert [type(error) for error in reader.errors()] == [UnknownSequence]
    assert engine.load().free_pages == engine.load().total_pages


def test_a_request_takes_the_shadow_s_pages(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, pages=14, backfill_rows=8, prefix_cache=False)
    stream = Stream(engine, "a", PROMPT * 2, features=True, new=8)
    stream.take(engine.step([stream.item()]).verdicts[0])
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    engine.run_background()
    open_one(engine, "urgent", PROMPT, new=8)  # fits only where the shadow is
    assert not engine.has_background_work  # it waits for pages
    engine.close([SequenceKey("urgent", 0)])
    while engine.has_background_work:
        engine.run_background()
    assert len(reader.rows(stream.key, info.feature_size)) == stream.computed


# ---------------------------------------------------------------- subscriptions


def test_a_slow_reader_is_left_behind_and_gets_everything_later(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = make_tap(size=64)
    engine.register_tap(info, tensors)
    limit = 10 * 128
    reader, quick = Reader(engine, limit), Reader(engine)
    streams = [Stream(engine, f"s{i}", [2, i, *PROMPT], features=True, drafts=garbage(2)) for i in range(3)]
    for stream in streams:
        for one in (reader, quick):
            engine.subscribe(one.stream, stream.key, info.tap_id, 0)
    for _ in range(12):
        result = engine.step([stream.item() for stream in streams])
        for stream, verdict in zip(streams, result.verdicts, strict=True):
            stream.take(verdict)
    engine.publish()
    assert limit <= reader.stream.queued_bytes <= limit + len(PROMPT) * 128  # one piece over the limit, no more
    for stream in streams:
        rows = quick.rows(stream.key, info.feature_size)
        assert len(rows) == stream.computed
        assert torch.equal(reader.rows(stream.key, info.feature_size), rows)


@pytest.mark.parametrize("tapped", [True, False])
def test_the_ids_behind_each_position_come_along(tiny_gemma: Path, tapped: bool) -> None:
    """Prompt pieces, accepted and rejected drafts, and a subscription in the middle."""
    engine = make_engine(tiny_gemma, prefix_cache=False)
    known = Stream(engine, "known", PROMPT, features=False).run()
    info, tensors = TAPS[0]
    tap_id, size = (info.tap_id, info.feature_size) if tapped else ("", 0)
    if tapped:
        engine.register_tap(info, tensors)
    for name, drafts in (("wrong", garbage(3)), ("some", oracle(PROMPT, known, 4, wrong_every=7))):
        stream = Stream(engine, name, PROMPT, features=True, drafts=drafts, piece=10)
        early, late = Reader(engine), Reader(engine)
        engine.subscribe(early.stream, stream.key, tap_id, 0)
        for _ in range(9):
            stream.take(engine.step([stream.item()]).verdicts[0])
        engine.subscribe(late.stream, stream.key, tap_id, 0)
        drive(engine, [stream], close=False)
        engine.publish()
        assert early.ids(stream.key, size) == late.ids(stream.key, size) == stream.ids[1:]
    assert engine.tap_ids == ((info.tap_id,) if tapped else ())


def test_ids_alone_recompute_nothing(tiny_gemma: Path) -> None:
    """Where features are missing, who wants no features does not notice."""
    engine = make_engine(tiny_gemma)
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    Stream(engine, "first", PROMPT, features=False).run()
    stream = Stream(engine, "again", PROMPT, features=True)
    assert stream.cached >= 32
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, "", 0)
    assert reader.ids(stream.key) == PROMPT[1 : stream.cached + 1]
    assert not engine.has_background_work
    assert not engine._feed.taps_in_use
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    assert engine.has_background_work


def test_a_slow_reader_of_ids_is_left_behind_too(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    limit = 4 * 60
    reader = Reader(engine, limit)
    stream = Stream(engine, "a", PROMPT, features=True)
    engine.subscribe(reader.stream, stream.key, "", 0)
    drive(engine, [stream], close=False)
    engine.publish()
    assert reader.stream.queued_bytes == limit < 4 * stream.computed
    assert reader.ids(stream.key) == stream.ids[1:]
    assert reader.stream.queued_bytes == 0


def test_a_new_subscription_replaces_the_old(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    stream = Stream(engine, "a", PROMPT, features=True)
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    stream.take(engine.step([stream.item()]).verdicts[0])
    engine.publish()
    engine.subscribe(reader.stream, stream.key, info.tap_id, 30)
    assert [(block.start, block.count) for block in reader.read()] == [(30, len(PROMPT) - 30)]
    engine.unsubscribe(reader.stream, stream.key)
    stream.take(engine.step([stream.item()]).verdicts[0])
    engine.publish()
    assert reader.read() == []
    assert not engine._feed.taps_in_use


def test_what_is_wrong_with_a_subscription_is_told(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = TAPS[0]
    engine.register_tap(info, tensors)
    open_one(engine, "with", PROMPT, features=True)
    open_one(engine, "without", PROMPT, features=False)
    reader = Reader(engine)
    for key, tap_id, position in (
        (SequenceKey("nobody", 0), info.tap_id, 0),
        (SequenceKey("with", 1), info.tap_id, 0),
        (SequenceKey("with", 0), "other", 0),
        (SequenceKey("without", 0), info.tap_id, 0),
        (SequenceKey("without", 0), "", 0),
        (SequenceKey("with", 0), info.tap_id, 10_000),
    ):
        engine.subscribe(reader.stream, key, tap_id, position)
    kinds = [UnknownSequence, StaleMessage, Mismatch, InvalidRequest, InvalidRequest, InvalidRequest]
    assert [type(error) for error in reader.errors()] == kinds
    engine.subscribe(reader.stream, SequenceKey("with", 0), info.tap_id, 0)
    engine.open([OpenSequence(SequenceKey("with", 1), tuple(PROMPT), Sampling(), 60)])
    assert [type(error) for error in reader.errors()] == [UnknownSequence]
    engine.leave(reader.stream)


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize(
    ("changes", "kind", "names"),
    [
        ({"model_fingerprint": "0" * 64}, Mismatch, "target"),
        ({"target_hidden_size": 128}, Mismatch, "target_hidden_size"),
        ({"target_vocab_size": 511}, Mismatch, "target_vocab_size"),
        ({"layer_ids": (1, 5)}, Mismatch, "layer_ids"),  # the last of six
        ({"layer_ids": (-2, 1)}, Mismatch, "layer_ids"),
        ({"layer_ids": (1, 1)}, InvalidRequest, "layer_ids"),
        ({"layer_ids": ()}, InvalidRequest, "layer_ids"),
        ({"feature_size": 0}, InvalidRequest, "feature_size"),
        ({"norm_eps": float("nan")}, InvalidRequest, "norm_eps"),
        ({"feature_size": 25}, InvalidRequest, "fc.weight"),
        ({"tap_id": "f" * 64}, InvalidRequest, "tap_id"),
    ],
)
def test_a_tap_that_does_not_fit_is_refused(
    tiny_gemma: Path, changes: dict[str, object], kind: type[DSparkError], names: str
) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = make_tap()
    fields = {name: getattr(info, name) for name in info.__dataclass_fields__} | changes
    broken = TapInfo(**fields)
    with pytest.raises(kind, match=names):
        engine.register_tap(broken if "tap_id" in changes else signed(broken, tensors), tensors)
    engine.register_tap(info, tensors)
    engine.register_tap(info, tensors)  # again: no harm
    assert engine.tap_ids == (info.tap_id,)


@pytest.mark.parametrize("name", ["torch", "llvm"])
def test_a_row_s_features_do_not_depend_on_its_company(name: str) -> None:
    kernels, reference = choices.named(name), torch.float32 if name == "llvm" else torch.bfloat16
    info, tensors = make_tap(layers=(1, 3), hidden=160, size=96, normalize_inputs=True)
    tap = Tap(info, tensors, kernels)
    captured = {layer: torch.randn(200, 160).bfloat16().to(reference) for layer in (1, 3)}
    torch.testing.assert_close(tap.project(captured), Tap(info, tensors, TORCH).project(captured), atol=1e-2, rtol=1e-2)
    whole = tap.project(captured)
    for rows in (1, 2, 3, 5, 8, 9, 17, 100):
        for first in (0, 7, 100):
            part = slice(first, first + rows)
            assert torch.equal(tap.project({layer: own[part] for layer, own in captured.items()}), whole[part])


def test_tensors_must_be_finite_and_complete(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    info, tensors = make_tap()
    nan = tensors | {"fc.weight": torch.full_like(tensors["fc.weight"], float("nan"))}
    for broken in (nan, {"fc.weight": tensors["fc.weight"]}, tensors | {"extra": torch.zeros(1)}):
        with pytest.raises(InvalidRequest):
            engine.register_tap(signed(info, broken), broken)


def test_the_oldest_unused_tap_makes_room(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, max_taps=2)
    taps = [make_tap(seed=i) for i in range(4)]
    for info, tensors in taps[:2]:
        engine.register_tap(info, tensors)
    open_one(engine, "a", PROMPT, features=True)
    reader = Reader(engine)
    engine.subscribe(reader.stream, SequenceKey("a", 0), taps[0][0].tap_id, 0)
    engine.register_tap(*taps[2])
    assert engine.tap_ids == (taps[0][0].tap_id, taps[2][0].tap_id)
    other = Reader(engine)
    engine.subscribe(other.stream, SequenceKey("a", 0), taps[2][0].tap_id, 0)
    with pytest.raises(Overloaded):
        engine.register_tap(*taps[3])


def test_drafting_with_right_drafts_keeps_features_of_accepted_positions(tiny_gemma: Path) -> None:
    expected = Stream(make_engine(tiny_gemma), "plain", PROMPT).run()
    engine = make_engine(tiny_gemma)
    info, tensors = TAPS[1]
    engine.register_tap(info, tensors)
    stream = Stream(engine, "a", PROMPT, features=True, drafts=oracle(PROMPT, expected, 5, wrong_every=4))
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    drive(engine, [stream], close=False)
    assert 0 < stream.accepted < stream.proposed
    rows = reader.rows(stream.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, stream.ids[:-1], info, tensors))
    assert np.isfinite(rows.float().numpy()).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_drafter_s_own_tap_fits_and_means_the_same(tiny_gemma: Path, normalize: bool) -> None:
    drafter = make_drafter(normalize_inputs=normalize, target_layer_ids=(-1, 1, 3))
    engine = make_engine(tiny_gemma)
    engine.register_tap(drafter.tap, drafter.tap_tensors())
    stream = Stream(engine, "a", PROMPT, features=True)
    reader = Reader(engine)
    engine.subscribe(reader.stream, stream.key, drafter.tap.tap_id, 0)
    drive(engine, [stream], close=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_gemma, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([stream.ids[:-1]]), output_hidden_states=True).hidden_states
        captured = torch.stack([states[layer + 1][0] for layer in drafter.tap.layer_ids], 1)
        expected = drafter.features(captured)
    assert close(reader.rows(stream.key, drafter.tap.feature_size), expected)
