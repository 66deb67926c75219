"""Every message survives the wire."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark import errors
from dspark import messages as m
from dspark.rpc import codec
from dspark.v1 import draft_pb2, types_pb2, verifier_pb2

UINT32 = st.integers(0, 2**32 - 1)
IDS = st.lists(UINT32, max_size=5).map(tuple)
FLOAT32 = st.floats(width=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = st.builds(m.SequenceKey, TEXT, UINT32)
SAMPLING = st.builds(
    m.Sampling,
    temperature=st.floats(),
    top_k=UINT32,
    top_p=st.floats(),
    min_p=st.floats(),
    seed=st.integers(0, 2**64 - 1),
    mode=st.sampled_from(m.Mode),
    logprobs=st.none() | UINT32,
)
LOGPROBS = st.builds(m.TokenLogprob, UINT32, FLOAT32)
POSITIONS = st.builds(m.PositionLogprobs, LOGPROBS, st.lists(LOGPROBS, max_size=3).map(tuple))
DISTRIBUTIONS = st.lists(st.tuples(UINT32, FLOAT32), max_size=4).map(
    lambda pairs: m.SparseDistribution(tuple(i for i, _ in pairs), tuple(p for _, p in pairs))
)
SOME_DISTRIBUTIONS = st.lists(DISTRIBUTIONS, max_size=3).map(tuple)
VERDICTS = st.builds(
    m.Verdict,
    KEYS,
    UINT32,
    UINT32,
    UINT32,
    st.none() | UINT32,
    st.lists(POSITIONS, max_size=2).map(tuple),
    error=st.none(),
    turned=st.booleans(),
    alternatives=UINT32,
)
ALTERNATIVE = st.builds(m.Alternative, UINT32, UINT32)
ALTERNATIVES = st.lists(ALTERNATIVE, max_size=3).map(tuple)
DRAFTED = st.lists(st.tuples(UINT32, FLOAT32), max_size=4)
PROPOSALS = st.builds(
    lambda key, length, drafted, distributions, other: m.Proposal(
        key,
        length,
        tuple(t for t, _ in drafted),
        tuple(c for _, c in drafted),
        distributions,
        alternatives=(other,) * len(drafted),
    ),
    KEYS,
    UINT32,
    DRAFTED,
    SOME_DISTRIBUTIONS,
    UINT32,
)
SECONDS = st.floats()
MESSAGES: dict[type, st.SearchStrategy[Any]] = {
    types_pb2.Sampling: SAMPLING,
    types_pb2.TokenLogprob: LOGPROBS,
    types_pb2.PositionLogprobs: POSITIONS,
    types_pb2.SparseDistribution: DISTRIBUTIONS,
    types_pb2.WorkerLoad: st.builds(
        m.WorkerLoad,
        UINT32,
        UINT32,
        UINT32,
        UINT32,
        UINT32,
        SECONDS,
        draining=st.booleans(),
        observed_ratio=SECONDS,
    ),
    types_pb2.ModelInfo: st.builds(
        m.ModelInfo, TEXT, TEXT, TEXT, TEXT, UINT32, UINT32, UINT32, UINT32, IDS, st.none() | UINT32, st.booleans()
    ),
    draft_pb2.DrafterInfo: st.builds(m.DrafterInfo, TEXT, TEXT, TEXT, TEXT, TEXT, UINT32, UINT32, UINT32),
    verifier_pb2.TapInfo: st.builds(
        m.TapInfo,
        TEXT,
        st.lists(st.integers(-1, 99), max_size=5).map(tuple),
        UINT32,
        UINT32,
        st.floats(),
        UINT32,
        TEXT,
        st.booleans(),
    ),
    verifier_pb2.OpenSequence: st.builds(m.OpenSequence, KEYS, IDS, SAMPLING, UINT32, st.booleans(), TEXT),
    verifier_pb2.Opened: st.builds(m.Opened, KEYS, UINT32, error=st.none()),
    verifier_pb2.Alternative: ALTERNATIVE,
    verifier_pb2.StepItem: st.builds(
        m.StepItem, KEYS, UINT32, UINT32, IDS, SOME_DISTRIBUTIONS, alternatives=ALTERNATIVES
    ),
    verifier_pb2.Verdict: VERDICTS,
    verifier_pb2.StepResult: st.builds(
        m.StepResult,
        st.lists(VERDICTS, max_size=3).map(tuple),
        SECONDS,
        SECONDS,
        SECONDS,
        SECONDS,
        SECONDS,
        SECONDS,
        other_tokens=UINT32,
        other_prompt_tokens=UINT32,
        other_sequences=UINT32,
        other_gained=UINT32,
    ),
    verifier_pb2.FeatureBlock: st.builds(
        m.FeatureBlock, KEYS, UINT32, UINT32, st.binary(), error=st.none(), token_ids=IDS
    ),
    draft_pb2.AttachSequence: st.builds(m.AttachSequence, KEYS, TEXT, SAMPLING, UINT32, TEXT),
    draft_pb2.Attached: st.builds(m.Attached, KEYS, error=st.none()),
    draft_pb2.ProposeItem: st.builds(m.ProposeItem, KEYS, UINT32, UINT32, UINT32),
    draft_pb2.Proposal: PROPOSALS,
    draft_pb2.ProposeResult: st.builds(
        m.ProposeResult,
        st.lists(PROPOSALS, max_size=3).map(tuple),
        SECONDS,
        SECONDS,
        SECONDS,
        SECONDS,
        SECONDS,
        SECONDS,
    ),
}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_round_trip_over_the_wire(kind: Any, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[kind])
    wire = codec.encode(message)
    assert type(wire) is kind
    back = codec.decode(kind.FromString(wire.SerializeToString()))
    assert type(back) is type(message)
    assert repr(back) == repr(message)  # NaN equals nothing, but reads the same
    if isinstance(message, m.FeatureBlock):
        assert back.data == message.data


def test_every_message_is_tested() -> None:
    dataclasses = {
        kind for kind in vars(m).values() if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")
    }
    assert len(dataclasses - {m.SequenceKey}) == len(MESSAGES)


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownSequence("s is not open"),
        errors.StaleMessage("epoch 1, present 2"),
        errors.OutOfPages("3 free"),
        errors.Mismatch("vocabulary"),
        errors.Unavailable("draining"),
        errors.InvalidRequest("top_p"),
        errors.InternalError("bug"),
    ],
)
def test_errors_keep_kind_and_message(error: errors.DSparkError) -> None:
    verdict = m.Verdict(m.SequenceKey("s", 1), 5, error=error)
    back = codec.decode(codec.encode(verdict)).error
    assert (type(back), str(back)) == (type(error), str(error))


def test_an_unknown_error_code_is_an_internal_error() -> None:
    assert isinstance(codec.decode(types_pb2.ItemError(code=99, message="?")), errors.InternalError)


def test_calls_and_replies() -> None:
    key, load = m.SequenceKey("s", 3), m.WorkerLoad(running=1)
    opens = (m.OpenSequence(key, (1, 2), m.Sampling(), 9),)
    items = (m.StepItem(key, 2, 1, (7,)),)
    asks = (m.ProposeItem(key, 2, 5, 4),)
    attach = (m.AttachSequence(key, "h:1", m.Sampling(), 9),)
    assert codec.decode(codec.open_call(opens).open) == opens
    assert codec.decode(codec.step_call(items).step) == items
    assert codec.decode(codec.close_call([key]).close) == (key,)
    assert codec.decode(codec.attach_call(attach).attach) == attach
    assert codec.decode(codec.propose_call(asks, 0.5).propose) == asks
    assert codec.propose_call(asks, 0.5).propose.wait_seconds == 0.5
    assert codec.decode(codec.detach_call([key]).detach) == (key,)
    assert codec.verifier_reply(1, None, load).WhichOneof("result") == "closed"
    assert codec.verifier_reply(1, [m.Opened(key)], load).WhichOneof("result") == "opened"
    assert codec.verifier_reply(1, m.StepResult(()), load).WhichOneof("result") == "step"
    assert codec.verifier_reply(1, errors.OutOfPages("x"), load).WhichOneof("result") == "error"
    assert codec.draft_reply(1, None, load).WhichOneof("result") == "detached"
    assert codec.draft_reply(1, [m.Attached(key)], load).WhichOneof("result") == "attached"
    assert codec.draft_reply(1, m.ProposeResult(()), load).WhichOneof("result") == "proposed"
    assert codec.draft_reply(1, errors.OutOfPages("x"), load).WhichOneof("result") == "error"
    assert codec.decode(codec.draft_reply(1, [], load).load) == load


def test_contradicting_fields_are_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match="1 token_ids but 0 probabilities"):
        codec.decode(types_pb2.SparseDistribution(token_ids=[1]))
    with pytest.raises(errors.InvalidRequest, match="0 tokens but 1 confidences"):
        codec.decode(draft_pb2.Proposal(confidences=[0.5]))
    with pytest.raises(errors.InvalidRequest, match="2 tokens but 1 alternatives"):
        codec.decode(draft_pb2.Proposal(tokens=[1, 2], alternatives=[3]))
    with pytest.raises(errors.InvalidRequest, match="mode 9"):
        codec.decode(types_pb2.Sampling(mode=9))  # type: ignore[arg-type]


def test_infinities_and_nan_pass() -> None:
    assert codec.decode(codec.encode(m.TokenLogprob(1, -math.inf))).logprob == -math.inf
    assert math.isnan(codec.decode(codec.encode(m.Sampling(temperature=math.nan))).temperature)
