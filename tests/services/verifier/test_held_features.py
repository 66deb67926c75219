"""Features that wait because nobody drafts: later all are there and the same, and who closes leaves nothing."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.reading import Reader, close, reference
from support.verifying import Stream, garbage, make_engine, make_tap, oracle

from dspark.errors import UnknownSequence
from services.verifier.engine import VerifyEngine

PROMPT = [2, *range(40, 75), 9, 9, 17, 300, 41]
TAPS = [make_tap()]


def hold(engine: VerifyEngine, streams: list[Stream]) -> None:
    """A step whose features may wait."""
    result = engine.step([replace(stream.item(), hold_features=True) for stream in streams])
    for stream, verdict in zip(streams, result.verdicts, strict=True):
        stream.take(verdict)
    engine.publish_due()()


def go_on(engine: VerifyEngine, reader: Reader, name: str, ids: Sequence[int], *, cached: int) -> Stream:
    """Somebody goes on with a text of which at least `cached` positions are known, and wants its features at once."""
    again = Stream(engine, name, ids, features=True)
    assert again.cached >= cached
    engine.subscribe(reader.stream, again.key, TAPS[0][0].tap_id, 0)
    again.take(engine.step([again.item()]).verdicts[0])
    engine.publish_due()()
    return again


def test_features_that_may_wait_come_later_and_are_the_same(tiny_gemma: Path) -> None:
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma)
    known = Stream(engine, "known", PROMPT, features=False).run()
    drafts = oracle(PROMPT, known, 4, wrong_every=5)
    found = []
    for holds in (False, True):
        engine = make_engine(tiny_gemma, prefix_cache=False)
        engine.register_tap(info, tensors)
        plain = Stream(engine, "plain", PROMPT, features=False, new=60)
        stream = Stream(engine, "a", PROMPT, features=True, drafts=drafts, piece=9)
        reader = Reader(engine)
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
        while not stream.done:
            for some in [plain], [stream, plain]:  # also steps that nobody wants features of lie between
                result = engine.step([replace(one.item(), hold_features=holds) for one in some])
                for one, verdict in zip(some, result.verdicts, strict=True):
                    one.take(verdict)
                engine.publish_due()()
            assert bool(reader.stream.queued_bytes) != holds
        engine.publish()
        found.append(reader.rows(stream.key, info.feature_size))
        assert len(found[-1]) == len(stream.ids) - 1
        assert not engine.has_background_work
    assert torch.equal(*found)


def test_states_of_many_rows_become_features_and_leave_when_somebody_asks(tiny_gemma: Path) -> None:
    info, tensors = TAPS[0]
    row = len(info.layer_ids) * 4 * make_engine(tiny_gemma).info.hidden_size
    engine = make_engine(tiny_gemma, held_bytes=100 * row)
    engine.register_tap(info, tensors)
    streams = [Stream(engine, f"s{i}", [2, i, *PROMPT], features=True) for i in range(5)]
    reader = Reader(engine)
    for stream in streams:
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    rows = 0
    for stream in streams:
        rows += stream.item().count
        hold(engine, [stream])
        assert 0 <= engine._held._bytes <= 100 * row
        assert bool(engine._features._buffers[info.tap_id].known.any()) == (rows > 100)
        assert not reader.stream.queued_bytes
    assert rows > 100
    engine.publish()
    for stream in streams:
        found = reader.rows(stream.key, info.feature_size)
        assert close(found, reference(tiny_gemma, stream.ids[:-1], info, tensors))


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_openings_and_closings_compute_no_held_features(tiny_gemma: Path, prefix_cache: bool) -> None:
    """What closes is forgotten, unless its pages are kept; what goes on has all of its features in the end."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma, prefix_cache=prefix_cache, pages=24)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    lasting = Stream(engine, "lasting", [2, 8, *PROMPT], features=True, new=60)
    engine.subscribe(reader.stream, lasting.key, info.tap_id, 0)
    hold(engine, [lasting])
    shorts = []
    for turn in range(10):  # more pages than there are: these are handed out again and again
        shorts.append(Stream(engine, f"short{turn}", [2, 9 + turn, *PROMPT], features=True, new=3))
        engine.subscribe(reader.stream, shorts[-1].key, info.tap_id, 0)
        while not shorts[-1].done:
            hold(engine, [lasting, shorts[-1]])
        engine.close([shorts[-1].key])
        assert {type(error) for error in reader.errors()} == {UnknownSequence}
        assert not any(block.count for block in reader.log)
        assert not engine._features._buffers[info.tap_id].known.any()
        left = [short.key for short in shorts] if prefix_cache else []
        assert {state.key for state in engine._held.states} == {lasting.key, *left}
    engine.publish()
    rows = reader.rows(lasting.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, lasting.ids[:-1], info, tensors))
    assert not engine.has_background_work
    engine.close([lasting.key])
    engine._held.drop_closed()
    assert (engine._held.states, engine._held._bytes) == ([], 0)


def test_who_goes_on_with_a_closed_text_has_its_features_unless_they_are_too_old(tiny_gemma: Path) -> None:
    """With room for the states of two texts the third's closing lets the first's go, and only those are recomputed."""
    info, tensors = TAPS[0]
    row = len(info.layer_ids) * 4 * make_engine(tiny_gemma).info.hidden_size
    engine = make_engine(tiny_gemma, pages=128, held_bytes=5 * row * (len(PROMPT) + 14) // 2)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    texts = []
    for turn in range(3):
        first = Stream(engine, f"first{turn}", [2, 9 + turn, *PROMPT], features=True, new=12)
        while not first.done:
            hold(engine, [first])
        engine.close([first.key])
        texts.append(first.ids)
    assert {state.key.sequence_id for state in engine._held.states} == {"first1", "first2"}
    for turn in (2, 1, 0):
        assert not engine.has_background_work
        again = go_on(engine, reader, f"again{turn}", texts[turn], cached=48)
        assert engine.has_background_work == (turn == 0)
        while engine.has_background_work:
            engine.run_background()
        rows = reader.rows(again.key, info.feature_size)
        assert close(rows, reference(tiny_gemma, again.ids[:-1], info, tensors))


def test_states_of_pages_that_were_given_to_others_become_nobody_s_features(tiny_gemma: Path) -> None:
    """A closed text of which only the beginning is still in the cache has features of the beginning, and no others'."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma, pages=7)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    first = Stream(engine, "first", [2, 9, *PROMPT, *PROMPT[:20]], features=True, new=4)
    while not first.done:
        hold(engine, [first])
    engine.close([first.key])
    second = Stream(engine, "second", [2, 10, *PROMPT, *PROMPT[:20]], features=True, new=4)
    engine.subscribe(reader.stream, second.key, info.tap_id, 0)
    while not second.done:
        second.take(engine.step([second.item()]).verdicts[0])
        engine.publish_due()()
    known = engine._features._buffers[info.tap_id].known.copy()
    taken = engine.find(second.key).cached.full_pages
    assert not engine._held.having(taken)
    engine._held.keep(engine._held.states)
    assert 0 < engine._features._buffers[info.tap_id].known.sum() - known.sum() <= 48
    engine.subscribe(reader.stream, second.key, info.tap_id, 0)
    rows = reader.rows(second.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, second.ids[:-1], info, tensors))


def test_texts_that_began_alike_at_once_keep_what_only_one_of_them_has(tiny_gemma: Path) -> None:
    """Of the beginning one's pages are kept; the other's are given away first, and nothing else of it is lost."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma, pages=128)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    both = [Stream(engine, f"{n}", [*PROMPT, n, *PROMPT], features=True, new=3) for n in (7, 8)]
    while not both[0].done:
        hold(engine, both)
    engine.close([stream.key for stream in both])
    hold(engine, [Stream(engine, "other", [2, 99, *PROMPT], features=True)])
    again = go_on(engine, reader, "again", both[1].ids, cached=80)
    assert not engine.has_background_work
    assert close(reader.rows(again.key, info.feature_size), reference(tiny_gemma, again.ids[:-1], info, tensors))


def test_many_texts_with_one_beginning_cost_whoever_goes_on_with_it_one_of_them(tiny_gemma: Path) -> None:
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma, pages=256)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    for turn in range(6):
        first = Stream(engine, f"first{turn}", [*PROMPT, 9 + turn, *PROMPT], features=True, new=3)
        while not first.done:
            hold(engine, [first])
        engine.close([first.key])
    again = go_on(engine, reader, "again", [*PROMPT, 99], cached=32)
    assert not engine.has_background_work
    assert close(reader.rows(again.key, info.feature_size), reference(tiny_gemma, again.ids[:-1], info, tensors))
    assert {state.key.sequence_id for state in engine._held.states} == {f"first{turn}" for turn in range(1, 6)}


def test_a_sequence_s_features_leave_while_others_are_held(tiny_gemma: Path) -> None:
    """And these are all there when they are wanted."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma)
    engine.register_tap(info, tensors)
    readers, streams = [Reader(engine) for _ in range(3)], []
    for i, reader in enumerate(readers):
        streams.append(Stream(engine, f"s{i}", [2, i, *PROMPT], features=True, drafts=garbage(2), piece=9))
        engine.subscribe(reader.stream, streams[-1].key, info.tap_id, 0)
    for turn in range(12):
        wanted = turn // 4  # who is
        items = [replace(stream.item(), hold_features=i != wanted) for i, stream in enumerate(streams)]
        for stream, verdict in zip(streams, engine.step(items).verdicts, strict=True):
            stream.take(verdict)
        engine.publish_due()()
        for reader in readers:
            reader.read()
        behind = [stream.computed > sum(b.count for b in r.log) for stream, r in zip(streams, readers, strict=True)]
        assert behind == [i != wanted for i in range(3)]
    engine.publish()
    for reader, stream in zip(readers, streams, strict=True):
        rows = reader.rows(stream.key, info.feature_size)
        assert close(rows, reference(tiny_gemma, stream.ids[:-1], info, tensors))
    assert not engine.has_background_work


@pytest.mark.parametrize("opened_held", [True, False])
@pytest.mark.parametrize("owner", ["goes on, held", "closes"])
def test_who_shares_held_pages_has_their_features_when_it_is_wanted(
    tiny_gemma: Path, owner: str, opened_held: bool
) -> None:
    """Held is not missing: nothing is recomputed, and what others of the same pages have stays where it is."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma, pages=128)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    first = Stream(engine, "first", PROMPT, features=True)
    stranger = Stream(engine, "stranger", [2, 5, *PROMPT], features=True)
    for stream in (first, stranger):
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
    hold(engine, [first, stranger])
    if not opened_held:
        other = Stream(engine, "other", [2, 4], features=True)
        other.take(engine.step([other.item()]).verdicts[0])
    second = Stream(engine, "second", PROMPT, features=True)
    assert second.cached >= 32
    engine.subscribe(reader.stream, second.key, info.tap_id, 0)
    if owner == "closes":
        engine.close([first.key])
    going = [first, stranger] if owner != "closes" else [stranger]
    items = [replace(stream.item(), hold_features=True) for stream in going]
    for stream, verdict in zip([*going, second], engine.step([*items, second.item()]).verdicts, strict=True):
        stream.take(verdict)
    engine.publish_due()()
    assert {block.key for block in reader.read() if block.error is None} == {second.key}
    assert not engine.has_background_work
    assert stranger.key in {state.key for state in engine._held.states}
    rows = reader.rows(second.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, second.ids[:-1], info, tensors))


def test_features_that_cannot_be_computed_are_nothing_to_the_call_that_comes_upon_them(tiny_gemma: Path) -> None:
    """They are recomputed where somebody wants them."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    streams = [Stream(engine, name, [2, n, *PROMPT], features=True) for n, name in enumerate(("goes", "stays"))]
    goes, stays = streams
    engine.subscribe(reader.stream, stays.key, info.tap_id, 0)
    hold(engine, streams)
    for held in itertools.chain.from_iterable(engine._held._rows.values()):
        held.part.captured.clear()  # type: ignore[attr-defined]
    engine.close([goes.key])
    assert engine.load().running == 1
    stays.take(engine.step([stays.item()]).verdicts[0])
    engine.publish_due()()
    while engine.has_background_work:
        engine.run_background()
    rows = reader.rows(stays.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, stays.ids[:-1], info, tensors))


def test_a_tap_of_other_layers_finds_nothing_held(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma)
    taps = [make_tap(layers=(0,), size=8, seed=7), make_tap(layers=(2,), size=8, seed=8)]
    reader = Reader(engine)
    stream = Stream(engine, "a", PROMPT, features=True)
    for info, tensors in taps:
        engine.register_tap(info, tensors)
        assert not engine._held.states
        closed = Stream(engine, f"of {info.tap_id}", [2, info.layer_ids[0], *PROMPT], features=True)
        hold(engine, [stream, closed])
        engine.close([closed.key])
        engine.register_tap(info, tensors)  # is known
        assert [state.key for state in engine._held.states] == [closed.key]
    engine.subscribe(reader.stream, stream.key, taps[0][0].tap_id, 0)
    engine.publish()
    assert close(reader.rows(stream.key, 8), reference(tiny_gemma, stream.ids[:-1], *taps[0]))
