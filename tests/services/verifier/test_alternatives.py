"""Alternatives to drafts: they save steps, and change neither a token nor a feature."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.reading import Reader
from support.verifying import GREEDY, Drafts, Others, Stream, drive, garbage, make_engine, make_tap, oracle

from dspark.errors import InvalidRequest
from dspark.messages import Alternative, Mode, PositionLogprobs, Sampling, StepItem, Verdict
from dspark.models.kv_cache import CachedSequence, KVCache
from services.verifier.engine import VerifyEngine

PROMPT = [2, *range(40, 75), 9, 9, 17, 300, 41]
COUPLED = Sampling(temperature=1.0, seed=11)
KINDS = {
    "greedy": GREEDY,
    "coupled": COUPLED,
    "filtered": Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=12),
    "logprobs": Sampling(temperature=1.0, seed=11, logprobs=2),
}
WRONG = 3  # of the right answer every so many drafts are wrong


@pytest.fixture(scope="module", params=["tiny_gemma", "tiny_qwen"])
def engine(request: pytest.FixtureRequest) -> VerifyEngine:
    return make_engine(request.getfixturevalue(request.param), pages=96)


def plain(engine: VerifyEngine, sampling: Sampling) -> list[int]:
    return Stream(engine, "plain", PROMPT, sampling=sampling).run()


def drafts(output: Sequence[int]) -> Drafts:
    return oracle(PROMPT, output, 5, wrong_every=WRONG)


def second_thoughts(output: Sequence[int], *, right: bool = True) -> Others:
    """An alternative to every draft but the fourth: of two wrong drafts one has the right token beside it."""
    whole = [*PROMPT, *output]

    def others(ids: Sequence[int], drafted: Sequence[int]) -> list[Alternative]:
        at = len(ids)
        return [
            Alternative(place, whole[at + place - 1] if right and (at + place - 1) // WRONG % 2 else (token + 7) % 512)
            for place, token in enumerate(drafted, 1)
            if place != 4
        ]

    return others


@pytest.mark.parametrize("kind", KINDS)
def test_alternatives_save_steps_and_change_no_token(engine: VerifyEngine, kind: str) -> None:
    expected = plain(engine, KINDS[kind])
    found = {}
    for right in (False, True):
        stream = Stream(
            engine,
            "turning",
            PROMPT,
            sampling=KINDS[kind],
            drafts=drafts(expected),
            others=second_thoughts(expected, right=right),
        )
        before = steps(engine)
        assert stream.run() == expected
        found[right] = steps(engine) - before
        assert 0 < stream.accepted < stream.proposed
        assert stream.turned == 0 or right
        assert stream.turned < stream.offered
    assert stream.turned >= 3
    assert found[True] < found[False]


def steps(engine: VerifyEngine) -> float:
    return engine.metrics.registry.get_sample_value("dspark_iteration_tokens_total_count") or 0.0


def test_a_crowd_of_turning_streams_changes_no_token(engine: VerifyEngine) -> None:
    outputs = [plain(engine, sampling) for sampling in KINDS.values()]
    crowd = [
        Stream(engine, name, PROMPT, sampling=KINDS[name], drafts=drafts(own), others=second_thoughts(own), piece=7 + n)
        for n, (name, own) in enumerate(zip(KINDS, outputs, strict=True))
    ]
    idle = Stream(engine, "idle", PROMPT, sampling=COUPLED, drafts=garbage(2))
    drive(engine, [*crowd, idle])
    assert [stream.output for stream in crowd] == outputs
    assert idle.output == plain(engine, COUPLED)
    assert all(stream.turned for stream in crowd)


def test_log_probabilities_are_those_of_plain_decoding(engine: VerifyEngine) -> None:
    sampling = KINDS["logprobs"]
    reports: list[list[PositionLogprobs]] = []
    output = plain(engine, sampling)
    for others in (lambda _ids, _drafts: (), second_thoughts(output)):
        stream = Stream(engine, "lp", PROMPT, sampling=sampling, drafts=drafts(output), others=others)
        reports.append([])
        while not stream.done:
            (verdict,) = engine.step([stream.item()]).verdicts
            reports[-1] += verdict.logprobs
            stream.take(verdict)
        engine.close([stream.key])
    assert stream.turned
    assert [entry.chosen.token_id for entry in reports[0]] == output
    assert reports[0] == reports[1]


def test_features_are_those_of_plain_decoding(tiny_gemma: Path) -> None:
    info, tensors = make_tap()
    engine = make_engine(tiny_gemma, prefix_cache=False)
    engine.register_tap(info, tensors)
    output = plain(engine, COUPLED)
    rows = []
    for others in (lambda _ids, _drafts: (), second_thoughts(output)):
        reader = Reader(engine)
        stream = Stream(
            engine, "f", PROMPT, sampling=COUPLED, drafts=drafts(output), others=others, piece=9, features=True
        )
        engine.subscribe(reader.stream, stream.key, info.tap_id, 0)
        drive(engine, [stream], close=False)
        rows.append(reader.rows(stream.key, info.feature_size))
        assert reader.ids(stream.key, info.feature_size) == stream.ids[1:]
        engine.close([stream.key])
    assert stream.turned
    assert torch.equal(*rows)


def test_where_there_is_no_page_there_is_no_alternative(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, pages=6, prefix_cache=False)
    output = plain(engine, GREEDY)
    stream = Stream(engine, "full", PROMPT, drafts=drafts(output), others=second_thoughts(output))
    assert engine.load().free_pages == 0
    verdicts: list[Verdict] = []
    while not stream.done:
        verdicts += engine.step([stream.item()]).verdicts
        stream.take(verdicts[-1])
    assert stream.output == output
    assert stream.offered
    assert stream.turned == 0
    assert not any(verdict.alternatives for verdict in verdicts)


def test_pages_of_alternatives_come_back(engine: VerifyEngine) -> None:
    output = plain(engine, GREEDY)
    before = engine.load().free_pages
    stream = Stream(engine, "back", PROMPT, drafts=drafts(output), others=second_thoughts(output))
    stream.run()
    assert stream.turned
    assert engine.load().free_pages == before


class Forgetful(KVCache):
    def adopt(self, fork: CachedSequence) -> None:
        del fork


def test_a_cache_that_adopts_nothing_gives_other_tokens(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, cache_of=Forgetful)  # the control: what is compared above can differ
    output = plain(engine, COUPLED)
    stream = Stream(engine, "wrong", PROMPT, sampling=COUPLED, drafts=drafts(output), others=second_thoughts(output))
    assert stream.run() != output


@pytest.mark.parametrize(
    ("places", "changes", "says"),
    [
        ((0,), {}, "places"),
        ((3,), {}, "places"),
        ((2, 1), {}, "places"),
        ((1, 1), {}, "places"),
        ((1,), {"keep": 1}, "keep"),
        ((1,), {"mode": Mode.REJECTION}, "rejection"),
        ((1,), {"token": 512}, "alternatives"),
    ],
)
def test_what_cannot_be_an_alternative_is_refused_alone(
    engine: VerifyEngine, places: tuple[int, ...], changes: dict[str, int | Mode], says: str
) -> None:
    mode = changes.get("mode", Mode.COUPLED)
    assert isinstance(mode, Mode)
    stream = Stream(engine, "bad", PROMPT, sampling=Sampling(seed=3, mode=mode))
    stream.take(engine.step([stream.item()]).verdicts[0])
    others = tuple(Alternative(place, int(changes.get("token", 5))) for place in places)  # type: ignore[arg-type]
    keep = changes.get("keep")
    item = StepItem(stream.key, len(stream.ids), 1, (7, 8), keep=keep, alternatives=others)  # type: ignore[arg-type]
    good = Stream(engine, "good", PROMPT)
    refused, served = engine.step([item, good.item()]).verdicts
    assert isinstance(refused.error, InvalidRequest)
    assert says in str(refused.error)
    assert served.error is None
    engine.close([stream.key, good.key])
