"""What the draft engine serves and what it refuses, and how its choices meet the verifier's."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.drafting import GREEDY, attach, block_of, feed, item, key_of, make_drafter, make_engine, make_features

from dspark.errors import (
    DSparkError,
    FeaturesMissing,
    InvalidRequest,
    OutOfPages,
    StaleMessage,
    UnknownSequence,
)
from dspark.messages import AttachSequence, Mode, ProposeItem, Sampling, SequenceKey
from dspark.models.drafters.calibration import Calibration
from services.draft.confidence import Confidences
from services.verifier.candidates import Candidate
from services.verifier.verification import verify

FEATURES = make_features(64)


def refusal(engine_item: ProposeItem, length: int = 10) -> DSparkError | None:
    engine = make_engine(make_drafter())
    attach(engine, key_of("a", 3))
    feed(engine, key_of("a", 3), FEATURES[:length])
    good, bad = engine.propose([item(key_of("a", 3), length + 1), engine_item]).proposals
    assert good.error is None
    assert len(good.tokens) == 5
    assert bad.tokens == ()
    assert bad.key == engine_item.key
    assert bad.committed_len == engine_item.committed_len
    return bad.error


def test_refusals_name_the_fault_and_spare_the_rest_of_the_batch() -> None:
    key = key_of("a", 3)
    cases: list[tuple[ProposeItem, type[DSparkError], str]] = [
        (item(key_of("b"), 11), UnknownSequence, "'b' epoch 0 is not attached"),
        (item(key_of("a", 2), 11), StaleMessage, "epoch 3 is attached"),
        (item(key_of("a", 4), 11), StaleMessage, "epoch 3 is attached"),
        (item(key, 12), FeaturesMissing, "of 10 positions are here, 11 are needed"),
        (item(key, 10), StaleMessage, "committed_len 10, 11 here"),
        (item(key, 0), InvalidRequest, "committed_len 0"),
        (item(key, 11, anchor=512), InvalidRequest, "anchor 512 is outside the vocabulary, 0 to 511"),
    ]
    for asked, kind, message in cases:
        error = refusal(asked)
        assert type(error) is kind
        assert message in str(error)


def test_a_call_of_nothing_but_refusals_runs_no_forward() -> None:
    result = make_engine(make_drafter()).propose([item(key_of("x"), 1), item(key_of("y"), 1)])
    assert [type(proposal.error) for proposal in result.proposals] == [UnknownSequence] * 2
    assert make_engine(make_drafter()).propose([]).proposals == ()


def test_room_is_reserved_and_given_back() -> None:
    engine = make_engine(make_drafter(), positions=210)
    attach(engine, key_of("a"), max_len=95)
    attach(engine, key_of("b"), max_len=95)
    with pytest.raises(OutOfPages, match="max_len 95 needs room for 112 context positions, 0 are free"):
        attach(engine, key_of("c"), max_len=95)
    assert (engine.load().running, engine.load().free_pages, engine.load().total_pages) == (2, 0, 14)
    engine.detach([key_of("b", 1), key_of("nobody"), key_of("b")])
    attach(engine, key_of("c"), max_len=95)
    engine.detach([key_of("a"), key_of("c")])
    assert (engine.load().running, engine.load().free_pages) == (0, 14)


def test_a_sequence_replaced_while_it_is_drafted_for_harms_no_other() -> None:
    engine = make_engine(make_drafter())
    for name in "ab":
        attach(engine, key_of(name))
        feed(engine, key_of(name), FEATURES[:10])
    alone = engine.propose([item(key_of("b"), 11)]).proposals[0].tokens
    inner: Any = engine._blocks
    draft = inner.draft

    def replacing(blocks: Any, count: int) -> Any:
        attach(engine, key_of("a", 1))  # as the event loop may at any time
        engine.detach([key_of("b")])
        return draft(blocks, count)

    inner.draft = replacing
    first, second = engine.propose([item(key_of("a"), 11), item(key_of("b"), 11)]).proposals
    assert (first.error, second.error) == (None, None)
    assert second.tokens == alone
    assert engine.length(key_of("a", 1)) == 0
    assert engine.load().running == 1


def test_room_that_could_not_be_used_is_given_back() -> None:
    engine = make_engine(make_drafter())
    inner: Any = engine._blocks
    free, opening = engine.load().free_pages, inner.open

    def refuse(_limit: int) -> Any:
        raise OutOfPages("all pages are taken")

    inner.open = refuse
    with pytest.raises(OutOfPages, match="all pages"):
        attach(engine, key_of())
    assert engine.load().free_pages == free
    inner.open = opening
    attach(engine, key_of())
    assert engine.load().running == 1


def test_a_sequence_cannot_outgrow_its_max_len() -> None:
    engine = make_engine(make_drafter())
    attach(engine, key_of(), max_len=12)
    feed(engine, key_of(), FEATURES[:12])
    assert engine.append_features([block_of(key_of(), FEATURES, 12, 13)]) == []
    assert engine.length(key_of()) == 12
    with pytest.raises(OutOfPages, match="13 context positions are over the 12 reserved"):
        engine.extend(key_of(), FEATURES[12:13])
    assert engine.propose([item(key_of(), 13)]).proposals[0].error is None


def test_attaching_again_keeps_and_a_newer_epoch_starts_over() -> None:
    engine = make_engine(make_drafter())
    attach(engine, key_of("a", 1))
    feed(engine, key_of("a", 1), FEATURES[:10])
    attach(engine, key_of("a", 1))
    assert engine.length(key_of("a", 1)) == 10
    with pytest.raises(StaleMessage, match="epoch 1 is attached"):
        attach(engine, key_of("a", 0))
    attach(engine, key_of("a", 2))
    assert engine.length(key_of("a", 1)) is None
    assert engine.length(key_of("a", 2)) == 0
    assert engine.load().running == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"max_len": 0}, "max_len 0"),
        ({"key": SequenceKey("", 0)}, "sequence_id is empty"),
        ({"sampling": Sampling(temperature=math.nan)}, "temperature nan"),
        ({"sampling": Sampling(temperature=-0.5)}, "temperature -0.5"),
        ({"sampling": Sampling(temperature=math.inf)}, "temperature inf"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p 0.0"),
        ({"sampling": Sampling(min_p=1.0)}, "min_p 1.0"),
    ],
)
def test_fields_out_of_their_limits_are_refused(changes: dict[str, Any], complaint: str) -> None:
    engine = make_engine(make_drafter())
    with pytest.raises(InvalidRequest, match=complaint):
        engine.attach(replace(AttachSequence(key_of("b"), "v:1", GREEDY, 10), **changes))
    assert engine.load().running == 0


def test_gaps_are_told_overlaps_and_strangers_ignored() -> None:
    engine, a, b = make_engine(make_drafter()), key_of("a", 1), key_of("b")
    attach(engine, a)
    attach(engine, b)
    assert engine.append_features([block_of(a, FEATURES, 0, 10), block_of(a, FEATURES, 10, 12)]) == []
    gap = [block_of(a, FEATURES, 13, 20), block_of(a, FEATURES, 20, 24), block_of(b, FEATURES, 0, 5)]
    assert engine.append_features(gap) == [a]
    assert (engine.length(a), engine.length(b)) == (12, 5)
    overlap = [block_of(a, FEATURES, 3, 9), block_of(a, FEATURES, 8, 20), block_of(a, FEATURES, 20, 20)]
    assert engine.append_features(overlap) == []
    strangers = [block_of(key_of("a", 0), FEATURES, 20, 30), block_of(key_of("z"), FEATURES, 5, 9)]
    assert engine.append_features(strangers) == []
    assert engine.length(a) == 20
    attach(engine, key_of("whole"))
    feed(engine, key_of("whole"), FEATURES[:20])
    drafted = engine.draft([item(a, 21), item(key_of("whole"), 21)])
    torch.testing.assert_close(*drafted.top_logits(), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("draft_vocab", [512, 128])
def test_rejection_ships_what_was_drawn_from(draft_vocab: int) -> None:
    engine = make_engine(make_drafter(draft_vocab_size=draft_vocab), top_k=16)
    settings = [
        Sampling(seed=1, mode=Mode.REJECTION),
        Sampling(seed=2),
        Sampling(seed=3, mode=Mode.REJECTION, top_p=0.6),
        GREEDY,
    ]
    for number, sampling in enumerate(settings):
        attach(engine, key_of(str(number)), sampling=sampling)
        feed(engine, key_of(str(number)), FEATURES[:20])
    proposals = engine.propose([item(key_of(str(number)), 21) for number in range(4)]).proposals
    assert [len(proposal.distributions) for proposal in proposals] == [5, 0, 5, 0]
    for proposal in (proposals[0], proposals[2]):
        for token, distribution in zip(proposal.tokens, proposal.distributions, strict=True):
            assert token in distribution.token_ids
            assert sum(distribution.probabilities) == pytest.approx(1.0, abs=1e-6)
            assert len(distribution.token_ids) <= 16
            assert all(token_id % (512 // draft_vocab) == 0 for token_id in distribution.token_ids)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_coupled_drafts_of_the_targets_own_distribution_are_accepted(temperature: float) -> None:
    """Where drafter and target agree on every logit, shared noise makes them agree on the tokens."""
    engine = make_engine(make_drafter(), top_k=512)
    keys = [key_of(str(number)) for number in range(24)]
    for number, key in enumerate(keys):
        attach(engine, key, sampling=Sampling(temperature=temperature, seed=number))
        feed(engine, key, FEATURES[: 5 + number])
    items = [item(key, 6 + number) for number, key in enumerate(keys)]
    drafted = engine.draft(items)
    logits = torch.stack([*drafted.logits, torch.zeros_like(drafted.logits[0])], 1)  # (b, 5 + 1, vocabulary)
    candidates = [
        Candidate(Sampling(temperature=temperature, seed=number), 6 * number, one.committed_len, tuple(tokens.tolist()))
        for number, (one, tokens) in enumerate(zip(items, drafted.tokens, strict=True))
    ]
    outcomes = verify(logits.flatten(0, 1), candidates, noise_candidates=512)
    assert [outcome.accepted for outcome in outcomes] == [5] * 24
    assert len({tuple(row.tolist()) for row in drafted.tokens}) > 20  # not all the same, as greedy drafts might be


def test_confidences_are_calibrated_by_setting_and_position() -> None:
    fitted = (
        Calibration("rejection", (0.5, 1.0, 2.0, 4.0, 8.0), (0.1, -0.2, 0.3, -0.4, 0.5)),
        Calibration("greedy", (3.0,) * 5, (1.0,) * 5),
    )
    engine = make_engine(make_drafter(calibration=fitted))
    settings = {
        "rejection": Sampling(seed=1, mode=Mode.REJECTION),
        "coupled": Sampling(seed=2),
        "greedy": Sampling(temperature=0.0, mode=Mode.REJECTION),
    }
    for name, sampling in settings.items():
        attach(engine, key_of(name), sampling=sampling)
        feed(engine, key_of(name), FEATURES[:20])
    items = [item(key_of(name), 21, max_tokens=4) for name in settings]
    raw = engine.draft(items).confidence_logits
    assert raw is not None
    plain = make_engine(make_drafter())
    attach(plain, key_of("greedy"))
    feed(plain, key_of("greedy"), FEATURES[:20])
    alone = plain.draft(items[2:]).confidence_logits
    assert alone is not None
    assert torch.equal(raw[2:], alone)  # logits stay raw
    table = {one.setting: (one.temperatures, one.biases) for one in fitted} | {"coupled": ((1.0,) * 5, (0.0,) * 5)}
    for name, row, proposal in zip(settings, raw.tolist(), engine.propose(items).proposals, strict=True):
        expected = [1 / (1 + math.exp(-(x / t + b))) for x, t, b in zip(row, *table[name], strict=False)]
        assert proposal.confidences == pytest.approx(expected, abs=1e-6)
        assert len(proposal.confidences) == 4


def test_curves_bend_at_their_knots() -> None:
    """Beside a straight one; what is certain stays so."""
    bent = Calibration("greedy", (2.0, 1.0), (0.5, 0.0), (((0.0, 0.5), (1.0, -0.75)), ()))
    confidences = Confidences([bent], 2)
    greedy, coupled = Sampling(temperature=0.0), Sampling()
    logits = torch.tensor([[-2.0, 3.0], [0.5, -1.0], [4.0, math.inf], [-math.inf, 0.0], [4.0, 1.0]])
    found = torch.from_numpy(confidences.of(logits, [greedy] * 4 + [coupled])).logit()
    expected = [[-0.5, 3.0], [1.0, -1.0], [2.25, math.inf], [-math.inf, 0.0], [4.0, 1.0]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_noise_is_of_the_position_and_the_seed() -> None:
    """Drafting again one position on gives the same token at the same position, where the logits leave it open."""
    drafter = make_drafter()
    with torch.no_grad():
        drafter.head_weight.zero_()
        drafter.head.markov_w2.weight.zero_()  # every token equally likely
    engine = make_engine(drafter, top_k=512)
    attach(engine, key_of(), sampling=Sampling(seed=5))
    feed(engine, key_of(), FEATURES[:9])
    first = engine.propose([item(key_of(), 10)]).proposals[0].tokens
    feed(engine, key_of(), FEATURES[:10])
    second = engine.propose([item(key_of(), 11)]).proposals[0].tokens
    assert first[1:] == second[:-1]
    attach(engine, key_of("other"), sampling=Sampling(seed=6))
    feed(engine, key_of("other"), FEATURES[:9])
    assert engine.propose([item(key_of("other"), 10)]).proposals[0].tokens != first


def test_load_tells_the_last_batch() -> None:
    engine = make_engine(make_drafter())
    engine.attach(AttachSequence(key_of(), "v:1", GREEDY, 30))
    result = engine.propose([item(key_of(), 1, max_tokens=3)])
    load = engine.load()
    assert (load.running, load.tokens_in_flight) == (1, 3)
    assert load.step_seconds == result.total_seconds >= result.forward_seconds > 0
