"""What is taken out of the inbox, and when."""

from dspark.messages import FeatureBlock, SequenceKey
from services.draft.inbox import FeatureInbox

A, B, C = (SequenceKey(name, 0) for name in "abc")


def inbox_of(*blocks: FeatureBlock) -> FeatureInbox:
    inbox = FeatureInbox(lambda: None)
    for key in (A, B, C):
        inbox.open(key)
    for block in blocks:
        inbox.feed(block)
    return inbox


def block(key: SequenceKey, start: int, count: int) -> FeatureBlock:
    return FeatureBlock(key, start, count, token_ids=tuple(range(start + 1, start + count + 1)))


def test_only_what_is_asked_for_is_taken_in_its_order() -> None:
    first, second, other = block(A, 0, 3), block(A, 3, 2), block(B, 0, 7)
    inbox = inbox_of(first, other, second)
    assert len(inbox) == 12
    assert list(inbox.keys) == [A, B]
    assert inbox.take([A, C]) == [first, second]
    assert len(inbox) == 7
    assert inbox.take([A]) == []
    assert inbox.take([B]) == [other]
    assert (len(inbox), list(inbox.keys)) == (0, [])
    assert (inbox.length(A), inbox.anchor(A), inbox.length(B)) == (5, 5, 7)


def test_a_piece_of_the_rest_comes_first_come_first_in_blocks() -> None:
    first, other, second, last = block(A, 0, 3), block(B, 0, 7), block(A, 3, 2), block(C, 0, 4)
    inbox = inbox_of(first, other, second, last)
    assert inbox.take([C], 6) == [last, first]
    assert len(inbox) == 9
    assert inbox.take((), 3) == [second, other]
    assert (len(inbox), list(inbox.keys)) == (0, [])


def test_a_gap_is_taken_along() -> None:
    before, behind = block(A, 0, 3), block(B, 5, 1)
    inbox = inbox_of(before, behind)
    assert inbox.pressing
    assert inbox.take(()) == [behind]
    assert not inbox.pressing
    inbox.feed(block(B, 7, 1))
    inbox.close(B)
    assert not inbox.pressing
    assert inbox.take([A]) == [before]


def test_what_is_closed_is_kept_no_longer() -> None:
    inbox = inbox_of(block(A, 0, 3), block(B, 0, 4))
    inbox.close(A)
    assert inbox.take([A]) == []
    assert len(inbox) == 4


def test_of_what_was_lost_only_what_goes_on_from_there_is_kept() -> None:
    answer, behind = block(A, 2, 4), block(A, 7, 1)
    inbox = inbox_of(block(A, 0, 6))
    assert inbox.take([A])
    inbox.feed(behind)  # position 6 is missing
    inbox.rewind(A, 2)
    assert (len(inbox), inbox.length(A), inbox.anchor(A)) == (0, 2, None)
    inbox.feed(answer)
    inbox.feed(behind)
    inbox.rewind(A, 2)
    assert (inbox.length(A), inbox.anchor(A), inbox.pressing) == (6, 6, False)
    assert inbox.take([A]) == [answer]
