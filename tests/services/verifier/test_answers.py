"""What callers of one step are told of each other."""

from dataclasses import replace

import pytest

from dspark.errors import InvalidRequest
from dspark.messages import Alternative, SequenceKey, StepItem, StepResult, Verdict
from services.verifier.answers import answers
from services.verifier.calls import Call


def drafts(name: str, count: int, *, accepted: int, turned: bool = False) -> tuple[StepItem, Verdict]:
    """A round that verifies so many drafts, and an alternative to the first one that was not accepted if `turned`."""
    key, beside = SequenceKey(name, 0), (Alternative(accepted + 1, 9),) if turned else ()
    item = StepItem(key, 10, 1, tuple(range(count)), alternatives=beside)
    return item, Verdict(key, 10, 11, accepted, 5, turned=turned, alternatives=len(beside))


def prompt(name: str, count: int, *, ends: bool) -> tuple[StepItem, Verdict]:
    """A piece of a prompt."""
    key = SequenceKey(name, 0)
    return StepItem(key, 40, count), Verdict(key, 40, count, token=5 if ends else None)


def told(*callers: list[tuple[StepItem, Verdict]]) -> list[StepResult]:
    """What each is told of one step of theirs."""
    calls = [Call(items=tuple(item for item, _ in pairs)) for pairs in callers]
    verdicts = tuple(verdict for pairs in callers for _, verdict in pairs)
    return answers(StepResult(verdicts, total_seconds=0.02), calls, began=calls[0].queued_at + 1)


def others(result: StepResult) -> tuple[int, int, int, int]:
    """Rows, those inside prompts, sequences that got tokens, and tokens."""
    return result.other_tokens, result.other_prompt_tokens, result.other_sequences, result.other_gained


def test_a_caller_alone_has_no_company() -> None:
    (alone,) = told([drafts("a", 3, accepted=2), prompt("b", 8, ends=False)])
    assert others(alone) == (0, 0, 0, 0)
    assert len(alone.verdicts) == 2
    assert alone.queue_seconds == pytest.approx(1.0, abs=0.5)


def test_each_is_told_its_own_verdicts_and_what_the_others_came_to() -> None:
    one, other, last = told(
        [drafts("a", 3, accepted=2), drafts("b", 0, accepted=0)],
        [drafts("c", 2, accepted=0, turned=True), prompt("d", 8, ends=False), prompt("e", 6, ends=True)],
        [prompt("f", 4, ends=False)],
    )
    assert [[verdict.key.sequence_id for verdict in result.verdicts] for result in (one, other, last)] == [
        ["a", "b"], ["c", "d", "e"], ["f"]
    ]  # fmt: skip
    # c: an anchor, two drafts and an alternative, of which that and the token behind it came; e: its last row chose one
    assert others(one) == (4 + 8 + 6 + 4, 8 + 5 + 4, 2, 2 + 1)
    assert others(other) == (5 + 4, 4, 2, 3 + 1)
    assert others(last) == (5 + 18, 8 + 5, 4, 4 + 3)


def test_an_item_that_was_refused_had_no_rows() -> None:
    item, verdict = drafts("a", 2, accepted=0)
    refused = Verdict(verdict.key, 10, error=InvalidRequest("no"))
    assert others(told([prompt("b", 2, ends=False)], [(item, refused)])[0]) == (0, 0, 0, 0)


def test_a_repeat_of_no_rows_counts_none_inside_a_prompt() -> None:
    """Whatever a caller sends must not break what the others are told."""
    item, verdict = drafts("a", 0, accepted=0)
    assert others(told([prompt("b", 2, ends=False)], [(replace(item, count=0), verdict)])[0]) == (0, 0, 1, 1)
