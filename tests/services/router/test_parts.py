"""What less than a whole block takes to draft."""

import pytest

from services.router.parts import Parts


def test_a_length_never_seen_is_presumed() -> None:
    parts = Parts(8)
    assert [parts.of(tokens) for tokens in (2, 4, 8, 16)] == pytest.approx([0.625, 0.75, 1.0, 1.0])
    for _ in range(9):
        parts.observe(2, 0.4)
    assert parts.of(2) == pytest.approx(0.4)
    assert parts.of(4) == pytest.approx(0.75)


def test_no_single_draft_decides_not_even_the_first() -> None:
    parts = Parts(8)
    parts.observe(2, 40.0)
    assert parts.of(2) == pytest.approx(0.625)
    for _ in range(9):
        parts.observe(2, 0.5)
    parts.observe(2, 40.0)
    assert parts.of(2) == pytest.approx(0.5)


def test_it_follows_a_machine_that_has_become_slow() -> None:
    parts = Parts(8)
    for _ in range(9):
        parts.observe(2, 0.5)
    for _ in range(5):
        parts.observe(2, 3.0)
    assert parts.of(2) == pytest.approx(3.0)
