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


def test_a_piece_of_the_rest_comes_first_come_first() -> None:
    blocks = [block(A, 0, 3), block(B, 0, 7), block(C, 0, 4)]
    inbox = inbox_of(*blocks)
    assert inbox.take([C], 6) == [blocks[2], blocks[0]]
    assert inbox.take((), 1) == [blocks[1]]


def test_a_gap_takes_everything_along() -> None:
    blocks = [block(A, 0, 3), block(B, 5, 1)]
    inbox = inbox_of(*blocks)
    assert inbox.pressing
    assert inbox.take([A]) == blocks
    assert not inbox.pressing


def test_what_is_closed_or_lost_is_kept_no_longer() -> None:
    inbox = inbox_of(block(A, 0, 3), block(B, 0, 4), block(C, 0, 5))
    inbox.close(A)
    inbox.rewind(B, 2)
    again = block(B, 2, 2)
    inbox.feed(again)
    assert len(inbox) == 7
    assert inbox.take([A, B]) == [again]
