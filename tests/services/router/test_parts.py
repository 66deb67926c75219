"""What less than a whole block takes to draft."""

import pytest

from services.router.parts import Parts


def test_a_length_never_seen_is_as_dear_as_the_next_longer_one() -> None:
    parts = Parts()
    assert parts.of(3) == 1.0
    parts.observe(4, 0.7)
    assert [parts.of(n) for n in (1, 4, 5, 7)] == pytest.approx([0.7, 0.7, 1.0, 1.0])
    parts.observe(2, 0.5)
    assert parts.of(1) == pytest.approx(0.5)
    assert parts.of(3) == pytest.approx(0.7)


def test_it_follows_and_no_single_draft_decides() -> None:
    parts = Parts()
    for _ in range(60):
        parts.observe(2, 0.5)
    parts.observe(2, 40.0)
    assert parts.of(2) < 0.65
    for _ in range(60):
        parts.observe(2, 0.8)
    assert parts.of(2) == pytest.approx(0.8, abs=0.01)
