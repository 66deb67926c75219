"""Features: what is computed equals the formula on transformers' hidden states, and who wants it gets all of it."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.drafting import make_drafter
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
from dspark.messages import FeatureBlock, OpenSequence, Sampling, SequenceKey, TapInfo
from services.verifier.engine import VerifyEngine
from services.verifier.feed import FeatureStream
from services.verifier.taps import Tap

PROMPT = [2, *range(40, 75), 9, 9, 17, 300, 41]


class Reader:
    """A draft worker's end of a stream, without the wire. Keeps every block it has read."""

    def __init__(self, engine: VerifyEngine, limit: int = 1 << 20) -> None:
        self.engine = engine
        self.log: list[FeatureBlock] = []
        self.wants_more = False
        self.woken = 0
        self.stream = FeatureStream(limit_bytes=limit, on_blocks=self._wake, on_room=self._room)

    def _wake(self) -> None:
        self.woken += 1

    def _room(self) -> None:
        self.wants_more = True

    def read(self) -> list[FeatureBlock]:
        """Everything queued, going on as the engine's thread would."""
        read = []
        while True:
            while blocks := self.stream.take():
                read += blocks
            if not self.wants_more:
                self.log += read
                return read
            self.wants_more = False
            self.engine.resume(self.stream)

    def rows(self, key: SequenceKey, size: int) -> torch.Tensor:
        """All blocks of one sequence joined; they must follow each other from 0 on."""
        self.read()
        own = [block for block in self.log if block.key == key and block.error is None]
        position = 0
        for block in own:
            assert block.start == position
            assert len(block.data) == 2 * size * block.count <= 1 << 20
            position += block.count
        data = bytearray(b"".join(block.data for block in own))
        assert data
        return torch.frombuffer(data, dtype=torch.bfloat16).view(-1, size)

    def ids(self, key: SequenceKey, size: int = 0) -> list[int]:
        """The ids behind positions 0, 1, … of one sequence, from all of its blocks, with features of that size."""
        self.read()
        own = [block for block in self.log if block.key == key and block.error is None]
        for before, block in itertools.pairwise([FeatureBlock(key, 0, 0), *own]):
            assert block.start == before.start + before.count
            assert (len(block.token_ids), len(block.data)) == (block.count, 2 * size * block.count)
        return [token_id for block in own for token_id in block.token_ids]

    def errors(self) -> list[DSparkError]:
        """Of what is queued now."""
        return [block.error for block in self.read() if block.error is not None]


def reference(path: Path, ids: list[int], info: TapInfo, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tap's formula on what transformers computes for the whole text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    layers = [states[layer + 1][0] for layer in info.layer_ids]  # entry 0 is the embedding
    if info.normalize_inputs:
        layers = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + info.norm_eps) for x in layers]
    y = torch.cat(layers, -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(()))
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + info.norm_eps) * tensors["hidden_norm.weight"]


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within bfloat16's rounding of the stored value."""
    assert actual.shape == expected.shape
    return torch.allclose(actual.float(), expected, rtol=2**-7, atol=2e-3)


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


def test_features_of_many_rows_do_not_wait(tiny_gemma: Path) -> None:
    info, tensors = TAPS[0]
    probe = make_engine(tiny_gemma)
    row = len(info.layer_ids) * 4 * probe.info.hidden_size
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
        assert bool(reader.stream.queued_bytes) == (rows > 100)
    assert rows > 100


def hold(engine: VerifyEngine, streams: list[Stream]) -> None:
    """A step whose features may wait."""
    result = engine.step([replace(stream.item(), hold_features=True) for stream in streams])
    for stream, verdict in zip(streams, result.verdicts, strict=True):
        stream.take(verdict)
    engine.publish_due()()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_openings_and_closings_compute_no_held_features_that_nobody_can_want(
    tiny_gemma: Path, prefix_cache: bool
) -> None:
    """What closes is forgotten, unless its pages are kept; what goes on has all of its features in the end."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma, prefix_cache=prefix_cache, pages=24)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    lasting = Stream(engine, "lasting", [2, 8, *PROMPT], features=True, new=60)
    engine.subscribe(reader.stream, lasting.key, info.tap_id, 0)
    hold(engine, [lasting])
    for turn in range(6):  # more pages than there are: these are handed out again and again
        short = Stream(engine, f"short{turn}", [2, 9 + turn, *PROMPT], features=True, new=3)
        engine.subscribe(reader.stream, short.key, info.tap_id, 0)
        while not short.done:
            hold(engine, [lasting, short])
        engine.close([short.key])
        assert {type(error) for error in reader.errors()} == {UnknownSequence}
        assert not any(block.count for block in reader.log)
        assert bool(engine._features._buffers[info.tap_id].known.any()) == prefix_cache
    engine.publish()
    rows = reader.rows(lasting.key, info.feature_size)
    assert close(rows, reference(tiny_gemma, lasting.ids[:-1], info, tensors))
    assert not engine.has_background_work


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


def test_a_text_that_shares_held_pages_gets_their_features_with_the_others(tiny_gemma: Path) -> None:
    """Held is not missing: nothing is recomputed, also if who computed them has closed."""
    info, tensors = TAPS[0]
    engine = make_engine(tiny_gemma)
    engine.register_tap(info, tensors)
    reader = Reader(engine)
    first = Stream(engine, "first", PROMPT, features=True)
    hold(engine, [first])
    hold(engine, [first])
    for name in ("second", "third"):
        stream = Stream(engine, name, PROMPT, features=True)
        assert stream.cached >= 32
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
        hold(engine, [stream])
        if name == "second":
            engine.close([first.key])
        assert not reader.read()
        assert not engine.has_background_work
        engine.publish()
        rows = reader.rows(stream.key, info.feature_size)
        assert close(rows, reference(tiny_gemma, stream.ids[:-1], info, tensors))


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


def test_a_row_s_features_do_not_depend_on_its_company() -> None:
    info, tensors = make_tap(layers=(1, 3), hidden=160, size=96, normalize_inputs=True)
    tap = Tap(info, tensors, TORCH)
    captured = {layer: torch.randn(200, 160).bfloat16() for layer in (1, 3)}
    whole = tap.project(captured, torch.arange(200))
    for rows in (1, 2, 3, 5, 8, 9, 17, 100):
        for first in (0, 7, 100):
            assert torch.equal(tap.project(captured, torch.arange(first, first + rows)), whole[first : first + rows])


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
