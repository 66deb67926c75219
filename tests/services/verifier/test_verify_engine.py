"""The engine's promise: what is drafted, batched, cut into pieces or found in a cache never changes a token."""

from pathlib import Path

import pytest
from support.verifying import GREEDY, Drafts, Stream, drive, garbage, make_engine, open_one, oracle, step_one

from dspark.errors import InvalidRequest, OutOfPages, StaleMessage, Unavailable, UnknownSequence
from dspark.messages import Mode, OpenSequence, Sampling, SequenceKey, SparseDistribution, StepItem
from services.verifier.engine import VerifyEngine

PROMPT = [2, *range(40, 75), 9, 9, 17, 300, 41]
COUPLED = Sampling(temperature=1.0, seed=11)
FILTERED = Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=12)
REJECTION = Sampling(temperature=1.0, seed=13, mode=Mode.REJECTION)


@pytest.fixture(scope="module", params=["tiny_gemma", "tiny_qwen"])
def target(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def engine(target: Path) -> VerifyEngine:
    return make_engine(target, pages=96)


def plain(engine: VerifyEngine, sampling: Sampling, prompt: list[int] = PROMPT, new: int = 24) -> list[int]:
    return Stream(engine, "plain", prompt, sampling=sampling, new=new).run()


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED, FILTERED], ids=["greedy", "coupled", "filtered"])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_drafts_do_not_change_tokens(engine: VerifyEngine, sampling: Sampling, length: int) -> None:
    expected = plain(engine, sampling)
    for drafts in (garbage(length), oracle(PROMPT, expected, length), oracle(PROMPT, expected, length, wrong_every=3)):
        stream = Stream(engine, "spec", PROMPT, sampling=sampling, drafts=drafts)
        assert stream.run() == expected
        assert stream.proposed > 0
    assert 0 < stream.accepted < stream.proposed  # the last kind: some right, some wrong


def test_right_drafts_save_steps(engine: VerifyEngine) -> None:
    expected = plain(engine, GREEDY)
    before = engine.metrics.registry.get_sample_value("dspark_iteration_tokens_total_count")
    stream = Stream(engine, "spec", PROMPT, drafts=oracle(PROMPT, expected, 7))
    stream.run()
    after = engine.metrics.registry.get_sample_value("dspark_iteration_tokens_total_count")
    assert stream.accepted == stream.proposed
    assert after is not None
    assert before is not None
    assert after - before <= 1 + (24 + 7) // 8


@pytest.mark.parametrize("piece", [1, 5, 16, 33])
def test_prompt_pieces_do_not_change_tokens(engine: VerifyEngine, piece: int) -> None:
    prompt = [100 + piece, *PROMPT]
    stream = Stream(engine, "pieces", prompt, sampling=COUPLED, piece=piece)
    assert stream.cached == 0
    pieces = stream.run()
    engine._cache.drop_prefixes()
    assert pieces == plain(engine, COUPLED, prompt)


def test_a_prefix_hit_does_not_change_tokens(engine: VerifyEngine, target: Path) -> None:
    prompt = [5, *PROMPT, *PROMPT]
    first = Stream(engine, "first", prompt, sampling=COUPLED)
    expected = first.run()
    again = Stream(engine, "again", prompt, sampling=COUPLED, drafts=garbage(3))
    assert first.cached == 0
    assert again.cached > 16
    assert again.run() == expected
    longer = Stream(engine, "longer", [*prompt, *expected], sampling=COUPLED)
    assert longer.cached > len(prompt)
    empty = make_engine(target, prefix_cache=False)
    assert longer.run() == Stream(empty, "fresh", [*prompt, *expected], sampling=COUPLED).run()


def test_a_crowd_does_not_change_tokens(engine: VerifyEngine) -> None:
    kinds: list[tuple[Sampling, Drafts, int]] = [
        (GREEDY, garbage(3), 512),
        (COUPLED, lambda _: (), 7),
        (FILTERED, garbage(1), 16),
        (COUPLED, garbage(7), 11),
        (Sampling(temperature=1.0, seed=3, logprobs=2), garbage(2), 512),
    ]
    prompts = [[2, 60 + i, *PROMPT[: 9 + 6 * i]] for i in range(len(kinds))]
    alone = [Stream(engine, "alone", p, sampling=kind[0]).run() for p, kind in zip(prompts, kinds, strict=True)]
    crowd = [
        Stream(engine, f"crowd{i}", prompt, sampling=sampling, drafts=drafts, piece=piece)
        for i, (prompt, (sampling, drafts, piece)) in enumerate(zip(prompts, kinds, strict=True))
    ]
    drive(engine, crowd)
    assert [stream.output for stream in crowd] == alone


def test_rejection_mode_runs_and_ends_at_max_len(engine: VerifyEngine) -> None:
    stream = Stream(engine, "rejection", PROMPT, sampling=REJECTION, drafts=garbage(5))
    assert len(stream.run()) == 24


def test_logprobs_cover_what_is_committed(engine: VerifyEngine) -> None:
    expected = plain(engine, GREEDY, new=8)
    open_one(engine, "lp", PROMPT, sampling=Sampling(temperature=0.0, logprobs=3))
    step_one(engine, "lp", len(PROMPT), 0 + len(PROMPT) - cached(engine, "lp"))
    verdict = step_one(engine, "lp", len(PROMPT) + 1, 1, expected[1:4])
    engine.close([SequenceKey("lp", 0)])
    assert verdict.accepted == 3
    assert [entry.chosen.token_id for entry in verdict.logprobs] == expected[1:5]
    assert all(len(entry.top) == 3 for entry in verdict.logprobs)


def cached(engine: VerifyEngine, name: str) -> int:
    return engine._sequences[name].computed_len


# ---------------------------------------------------------------- what is refused, and what it leaves alone


def test_a_repeat_is_answered_from_memory_whatever_it_drafts(engine: VerifyEngine) -> None:
    open_one(engine, "r", PROMPT)
    first = step_one(engine, "r", len(PROMPT), len(PROMPT) - cached(engine, "r"))
    assert step_one(engine, "r", len(PROMPT), 1) == first
    second = step_one(engine, "r", len(PROMPT) + 1, 1, [4, 5])
    assert step_one(engine, "r", len(PROMPT) + 1, 1, [second.token or 0] * 7) == second
    with pytest.raises(StaleMessage, match="committed_len"):
        step_one(engine, "r", len(PROMPT), 1)  # the step before the last
    engine.close([SequenceKey("r", 0)])


def test_one_bad_item_hurts_no_other(engine: VerifyEngine) -> None:
    expected = plain(engine, COUPLED)
    stream = Stream(engine, "good", PROMPT, sampling=COUPLED)
    open_one(engine, "bystander", PROMPT)
    key, n = SequenceKey("bystander", 0), len(PROMPT)
    bad = [
        (StepItem(SequenceKey("nobody", 0), 5, 1), UnknownSequence),
        (StepItem(SequenceKey("good", 1), 5, 1), InvalidRequest),  # the second about one sequence
        (StepItem(SequenceKey("bystander", 7), n, 1), StaleMessage),
    ]
    result = engine.step([stream.item(), *(item for item, _ in bad)])
    stream.take(result.verdicts[0])
    assert [type(verdict.error) for verdict in result.verdicts[1:]] == [kind for _, kind in bad]
    for item in (
        StepItem(key, n, 0),
        StepItem(key, n, n + 1),
        StepItem(key, n, 1, (5,)),
        StepItem(key, n, n - cached(engine, "bystander"), (512,)),
    ):
        (verdict,) = engine.step([item]).verdicts
        assert isinstance(verdict.error, InvalidRequest), item
    drive(engine, [stream])
    engine.close([key])
    assert stream.output == expected


@pytest.mark.parametrize(
    "distribution",
    [
        SparseDistribution((600,), (1.0,)),
        SparseDistribution((5, 5), (0.5, 0.5)),
        SparseDistribution((5, 6), (0.5, float("nan"))),
        SparseDistribution((5, 6), (1.5, -0.5)),
        SparseDistribution((5, 6), (0.1, 0.1)),
        SparseDistribution((6, 7), (0.5, 0.5)),  # not the token's
    ],
)
def test_a_broken_draft_distribution_is_refused_alone(engine: VerifyEngine, distribution: SparseDistribution) -> None:
    expected = plain(engine, COUPLED)
    stream = Stream(engine, "good", PROMPT, sampling=COUPLED)
    open_one(engine, "odd", PROMPT, sampling=REJECTION)
    n, key = len(PROMPT), SequenceKey("odd", 0)
    item = StepItem(key, n, n - cached(engine, "odd"), (5,), (distribution,))
    result = engine.step([item, stream.item()])
    stream.take(result.verdicts[1])
    assert isinstance(result.verdicts[0].error, InvalidRequest)
    assert step_one(engine, "odd", n, n - cached(engine, "odd"), [5]).token is not None  # as if nothing had been
    drive(engine, [stream])
    engine.close([key])
    assert stream.output == expected


def test_drafts_past_max_len_are_dropped(engine: VerifyEngine) -> None:
    expected = plain(engine, GREEDY, new=4)
    open_one(engine, "short", PROMPT, new=4)
    step_one(engine, "short", len(PROMPT), len(PROMPT) - cached(engine, "short"))
    verdict = step_one(engine, "short", len(PROMPT) + 1, 1, [*expected[1:], 9, 9])
    assert (verdict.accepted, verdict.token) == (2, expected[3])
    with pytest.raises(InvalidRequest, match="max_len"):
        step_one(engine, "short", len(PROMPT) + 4, 1)
    engine.close([SequenceKey("short", 0)])


def opening(**changes: object) -> OpenSequence:
    fields = {"key": SequenceKey("bad", 0), "token_ids": (2, 3), "sampling": GREEDY, "max_len": 20}
    return OpenSequence(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (opening(token_ids=()), "token_ids"),
        (opening(token_ids=(2, 512)), "512"),
        (opening(max_len=2), "max_len"),
        (opening(max_len=100_000), "context"),
        (opening(key=SequenceKey("", 0)), "sequence_id"),
        (opening(sampling=Sampling(temperature=float("nan"))), "temperature"),
        (opening(sampling=Sampling(temperature=-1.0)), "temperature"),
        (opening(sampling=Sampling(top_p=0.0)), "top_p"),
        (opening(sampling=Sampling(top_p=float("nan"))), "top_p"),
        (opening(sampling=Sampling(min_p=1.0)), "min_p"),
        (opening(sampling=Sampling(logprobs=1000)), "logprobs"),
    ],
)
def test_bad_openings_name_the_field(engine: VerifyEngine, request_: OpenSequence, names: str) -> None:
    (opened,) = engine.open([request_])
    assert isinstance(opened.error, InvalidRequest)
    assert names in str(opened.error)


def test_epochs_replace_and_refuse(engine: VerifyEngine) -> None:
    free = engine.load().free_pages
    open_one(engine, "e", PROMPT, epoch=3)
    assert open_one(engine, "e", PROMPT, epoch=3) == cached(engine, "e")  # a repeat
    with pytest.raises(StaleMessage):
        open_one(engine, "e", PROMPT, epoch=2)
    with pytest.raises(StaleMessage):
        open_one(engine, "e", PROMPT[:-1], epoch=3)
    open_one(engine, "e", [*PROMPT, 7], epoch=4)
    engine.close([SequenceKey("e", 3)])  # late: another epoch is open
    assert engine.load().running == 1
    engine.close([SequenceKey("e", 4)])
    engine.close([SequenceKey("e", 4)])
    assert engine.load().running == 0
    assert engine.load().free_pages == free


def test_a_draining_worker_opens_nothing_and_finishes_what_runs(engine: VerifyEngine) -> None:
    stream = Stream(engine, "last", PROMPT)
    engine.draining = True
    try:
        with pytest.raises(Unavailable):
            open_one(engine, "late", PROMPT)
        assert engine.load().draining
        assert stream.run() == plain_after(engine)
    finally:
        engine.draining = False


def plain_after(engine: VerifyEngine) -> list[int]:
    engine.draining = False
    return plain(engine, GREEDY)


def test_steps_larger_than_a_forward_are_split(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, max_step_tokens=20)
    streams = [Stream(engine, f"s{i}", [2, 30 + i, *PROMPT[:14]], drafts=garbage(7), piece=11) for i in range(4)]
    drive(engine, streams)
    open_one(engine, "large", PROMPT)
    with pytest.raises(InvalidRequest, match="max_step_tokens is 20"):
        step_one(engine, "large", len(PROMPT), 21)
    alone = make_engine(tiny_gemma)
    assert [stream.output for stream in streams] == [
        Stream(alone, "a", [2, 30 + i, *PROMPT[:14]]).run() for i in range(4)
    ]


def test_pages_are_reserved_to_the_end(tiny_gemma: Path) -> None:
    engine = make_engine(tiny_gemma, pages=16)
    open_one(engine, "big", PROMPT, new=100)
    with pytest.raises(OutOfPages):
        open_one(engine, "second", PROMPT[::-1], new=150)
    open_one(engine, "small", [2, 3], new=8)
    engine.close([SequenceKey("big", 0)])
    open_one(engine, "second", PROMPT[::-1], new=150)
