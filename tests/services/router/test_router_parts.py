"""The router's small parts, one by one."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.toys import tokenizer_json

from dspark.errors import InternalError, Overloaded
from dspark.messages import Sampling
from dspark.tokenizer import Tokenizer
from services.router.admission import Admission
from services.router.counts import Counts
from services.router.finish import PORTION, FinishReason, StopText, cut
from services.router.outlet import Delta, Outlet
from services.router.requests import Request

TOKENIZER = Tokenizer(tokenizer_json())
BYTE = 2


# ---------------------------------------------------------------- counts


@given(rounds=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=30))
def test_counts_are_conditional(rounds: list[tuple[int, int]]) -> None:
    counts = Counts()
    rounds = [(verified, min(verified, accepted)) for verified, accepted in rounds]
    for verified, accepted in rounds:
        counts.add_round(drafted=7, verified=verified, accepted=accepted, missed=verified == 0)
    assert counts.rounds == len(rounds)
    assert counts.accepted == sum(counts.accepted_at) == sum(accepted for _, accepted in rounds)
    assert counts.missed_rounds == sum(verified == 0 for verified, _ in rounds)
    for k in range(7):
        reached = sum(verified > k and accepted >= k for verified, accepted in rounds)
        kept = sum(accepted > k for _, accepted in rounds)
        assert (counts.verified_at[k] if k < len(counts.verified_at) else 0) == reached
        assert (counts.accepted_at[k] if k < len(counts.accepted_at) else 0) == kept


def test_a_window_s_edge_refuses_nothing() -> None:
    """Seven drafts verified, five stood, two might be kept: the third was not refused, it was not looked at."""
    counts = Counts()
    counts.add_round(drafted=7, verified=7, accepted=2, missed=False, matched=5)
    counts.add_round(drafted=7, verified=7, accepted=2, missed=False, matched=2)
    assert counts.verified_at == [2, 2, 1]
    assert counts.accepted_at == [2, 2, 0]


# ---------------------------------------------------------------- text and its end


def spoken(text: str, stop: list[str]) -> tuple[str, str | None, list[str]]:
    stream = StopText(TOKENIZER, stop)
    shown = []
    for byte in text.encode():
        shown.append(stream.push(BYTE + byte))
        if stream.matched is not None:
            return "".join(shown), stream.matched, shown
    shown.append(stream.flush())
    return "".join(shown), stream.matched, shown


@given(text=st.text("ab", max_size=14), stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Byte tokens arrive together at the end; the plain rule says where the text must be cut."""
    shown, matched, _ = spoken(text, stop)
    starts = [at for string in stop if (at := text.find(string)) >= 0]
    if starts:
        assert matched is not None
        assert shown == text[: min(starts)]
    else:
        assert (shown, matched) == (text, None)


@given(
    words=st.lists(st.sampled_from(["a", "b", "c", "é", "👍"]), max_size=14),
    stop=st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3),
)
def test_what_was_shown_is_never_part_of_a_stop_string(words: list[str], stop: list[str]) -> None:
    stream = StopText(TOKENIZER, stop)
    shown = ""
    for word in words:
        for token in TOKENIZER.encode(word, special_tokens=False):
            shown += stream.push(token)
            assert not any(string in shown for string in stop)
        if stream.matched:
            break
    shown += stream.flush()
    whole = "".join(words)
    assert whole.startswith(shown)
    assert not any(string in shown for string in stop)
    assert bool(stream.matched) == any(string in whole for string in stop)


def test_a_whole_answers_text_comes_with_its_portions() -> None:
    stream = StopText(TOKENIZER, [], whole=True)
    token = TOKENIZER.encode("a", special_tokens=False)[0]
    shown = [stream.push(token) for _ in range(2 * PORTION + 3)]
    assert [len(text) for text in shown if text] == [PORTION, PORTION]
    assert stream.flush() == "aaa"


@given(text=st.text("aé👍", max_size=14), stop=st.lists(st.text("aé", min_size=1, max_size=3), max_size=2))
def test_a_whole_answer_has_the_text_of_a_streamed_one(text: str, stop: list[str]) -> None:
    streamed, whole = StopText(TOKENIZER, stop), StopText(TOKENIZER, stop, whole=True)
    shown = ["", ""]
    for token in TOKENIZER.encode(text, special_tokens=False):
        for place, one in enumerate((streamed, whole)):
            shown[place] += one.push(token)
        assert stop or not shown[1]
        assert streamed.matched == whole.matched
        if streamed.matched is not None:
            break
    assert shown[0] + streamed.flush() == shown[1] + whole.flush()
    assert streamed.matched == whole.matched


def request(**fields: object) -> Request:
    return Request("r", (0,), Sampling(), max_tokens=10, **fields)  # type: ignore[arg-type]


def test_cut_stops_at_ids_and_at_the_limit() -> None:
    stops = request(stop_token_ids=frozenset({7}))
    assert cut([1, 2, 3], 10, stops) == (3, None)
    assert cut([1, 7, 3], 10, stops) == (2, FinishReason.STOP)
    assert cut([1, 2, 3], 2, stops) == (2, FinishReason.LENGTH)
    assert cut([1, 7], 2, stops) == (2, FinishReason.STOP)
    assert cut([1, 2, 7], 2, stops) == (2, FinishReason.LENGTH)


# ---------------------------------------------------------------- outlet


async def test_an_outlet_joins_what_was_not_read_and_ends_in_order() -> None:
    outlet = Outlet(limit=4)
    rooms = []
    outlet.on_room = lambda: rooms.append(1)
    outlet.push(Delta("a", (1,)))
    outlet.push(Delta("", (2, 3)))
    assert not outlet.full
    outlet.push(Delta("bc", (4,)))
    assert outlet.full
    assert await outlet.next() == Delta("abc", (1, 2, 3, 4))
    assert rooms == [1]
    outlet.push(Delta("d", (5,)))
    outlet.end(InternalError("first"))
    outlet.end(InternalError("second"))
    outlet.push(Delta("late", (6,)))
    assert await outlet.next() == Delta("d", (5,))
    for _ in range(2):
        with pytest.raises(InternalError, match="first"):
            await outlet.next()


async def test_an_outlet_of_a_whole_answer_says_nothing_before_the_end_but_in_portions() -> None:
    outlet = Outlet(limit=4, whole=True)
    outlet.push(Delta("a", (1, 2, 3)))
    reading = asyncio.ensure_future(outlet.next())
    await asyncio.sleep(0.01)
    assert not reading.done()
    outlet.push(Delta("b", (4,)))
    assert await reading == Delta("ab", (1, 2, 3, 4))
    outlet.push(Delta("c", (5,)))
    reading = asyncio.ensure_future(outlet.next())
    await asyncio.sleep(0.01)
    assert not reading.done()
    outlet.end(InternalError("over"))
    assert await reading == Delta("c", (5,))
    with pytest.raises(InternalError, match="over"):
        await outlet.next()


# ---------------------------------------------------------------- admission


async def test_tickets_are_given_back_once() -> None:
    admission = Admission(max_queue=2)
    with admission.enter("a") as first, admission.enter("a"):
        with pytest.raises(Overloaded, match="the limit is 2") as caught:
            admission.enter("a")
        assert 0.1 <= caught.value.retry_after <= 60
        first.leave()
        first.leave()
        assert admission.queued == 1
        admission.enter("a").leave()
    assert admission.queued == 0


async def test_waiting_for_its_turn_can_be_cancelled() -> None:
    admission = Admission(max_queue=10, rate=1)
    await admission.enter("a").pace()
    with admission.enter("a") as second:
        waiting = asyncio.create_task(second.pace())
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded, match="1 a second"):
            admission.enter("a")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    admission.enter("a").leave()


async def test_keys_are_forgotten() -> None:
    admission = Admission(max_queue=5000, rate=100)
    for number in range(3000):
        admission.enter(str(number)).leave()
    for lane in admission._lanes.values():
        lane.used_at -= 2
    admission.enter("new").leave()
    assert len(admission._lanes) == 1
