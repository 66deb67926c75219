"""What is run when, and what comes of it: turns, medians, ratios, the table."""

import io

import pytest
from rich.console import Console

from benchmarks.peering.engine import Answer
from benchmarks.peering.ratios import Turn, common_start, summarise
from benchmarks.peering.workload import Cell, Workload
from benchmarks.peers import table
from dspark.errors import ConfigError

PROMPTS = [[n] for n in range(10)]
WORKLOAD = Workload(streams=(1, 4), requests=(2, 4), repeats=3, max_tokens=5, seed=100)


def turn(engine: str, repeat: int, speed: float, *, temperature: float = 0.0, tokens: tuple[int, ...] = (1,)) -> Turn:
    answer = Answer((tokens,), len(tokens) / speed, {"tau": 2.0 + repeat} if engine == "dspark" else {})
    return Turn(Cell(repeat, temperature, 8), engine, 0.0, answer)


def test_engines_take_turns_and_the_first_changes() -> None:
    cells = list(WORKLOAD.cells())
    assert len(cells) == len(set(cells)) == 3 * 2 * 2
    assert [WORKLOAD.turns(Cell(r, 0.0, 1), ["a", "b"]) for r in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_repeats_go_on_through_the_prompts_with_other_seeds() -> None:
    works = [WORKLOAD.work(Cell(repeat, 1.0, 4), PROMPTS) for repeat in range(3)]
    assert [work.prompts for work in works] == [
        ((0,), (1,), (2,), (3,)),
        ((4,), (5,), (6,), (7,)),
        ((8,), (9,), (0,), (1,)),
    ]
    assert [work.seed for work in works] == [100, 104, 108]
    assert {(work.streams, work.temperature, work.max_tokens) for work in works} == {(4, 1.0, 5)}
    assert WORKLOAD.context([[1, 2, 3], [1]]) == 9


def test_engines_are_warmed_up_at_every_setting() -> None:
    works = WORKLOAD.warm_up(PROMPTS)
    assert [(work.streams, work.temperature) for work in works] == [(4, 0.0), (4, 1.0), (1, 0.0), (1, 1.0)]
    assert {work.max_tokens for work in works} == {8}


@pytest.mark.parametrize(("streams", "requests"), [((1, 8), (8,)), ((8,), (7,)), ((0,), (8,))])
def test_streams_that_cannot_be_kept_busy_are_refused(streams: tuple[int, ...], requests: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="requests"):
        Workload(streams=streams, requests=requests)


def test_ratios_are_taken_within_a_repeat_and_then_their_median() -> None:
    # The machine slows down to a third: a ratio of medians would say 40/20, and the neighbours say 1.5.
    turns = [turn("vllm", r, s) for r, s in enumerate((40.0, 20.0, 10.0))]
    turns += [turn("dspark", r, s) for r, s in enumerate((40.0, 30.0, 40.0))]
    ours, theirs = summarise(turns, "dspark")
    assert (ours.engine, ours.ratio, ours.tokens_per_second) == ("dspark", None, 40.0)
    assert ours.notes == {"tau": 3.0}
    assert theirs.values == (40.0, 20.0, 10.0)
    assert theirs.ratio is not None
    assert theirs.ratio.values == pytest.approx((1.0, 1.5, 4.0))
    assert (theirs.ratio.low, theirs.ratio.median, theirs.ratio.high) == pytest.approx((1.0, 1.5, 4.0))


def test_a_repeat_without_its_partner_gives_no_ratio() -> None:
    ours, theirs = summarise([turn("dspark", 0, 30.0), turn("vllm", 1, 10.0)], "dspark")
    assert ours.ratio is theirs.ratio is None
    assert theirs.common_start is None
    assert summarise([], "dspark") == []


def test_what_greedy_answers_share_is_counted_from_their_start() -> None:
    assert common_start(Answer(((1, 2, 3), (5, 6)), 1.0), Answer(((1, 2, 4), (6, 6)), 1.0)) == 1.0
    turns = [turn("dspark", 0, 1.0, tokens=(1, 2, 3)), turn("vllm", 0, 1.0, tokens=(1, 2, 4))]
    assert summarise(turns, "dspark")[1].common_start == 2.0
    sampled = [turn("dspark", 0, 1.0, temperature=1.0), turn("vllm", 0, 1.0, temperature=1.0)]
    assert summarise(sampled, "dspark")[1].common_start is None


def test_the_table_has_a_line_for_each_engine_and_setting() -> None:
    turns = [
        turn(e, r, s, temperature=t) for e, s in (("dspark", 60.0), ("vllm", 24.0)) for r in (0, 1) for t in (0, 1)
    ]
    text = io.StringIO()
    Console(width=120, file=text).print(table(summarise(turns, "dspark")))
    assert text.getvalue().count("2.50 (2.50-2.50)") == 2
    assert text.getvalue().count("24.0 (24.0-24.0)") == 2
