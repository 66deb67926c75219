"""What drafting is expected to take follows what rounds really waited."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dspark.messages import Proposal, SequenceKey, StepResult
from services.router.costs import RoundCosts
from services.router.links import DraftLink, VerifierLink
from services.router.parts import Parts
from services.router.proposing import Drafts

BLOCKS = {"s": Proposal(SequenceKey("s", 0), 5, (1, 2, 3))}


class Table:
    """4 ms and one more for each request."""

    def table(self, requests: int, _context: float) -> Any:
        return 0.004 + 0.001 * np.arange(requests + 1)


def costs() -> RoundCosts:
    return RoundCosts(cast("VerifierLink", SimpleNamespace(costs=None)))


def link() -> DraftLink:
    return cast("DraftLink", SimpleNamespace(costs=Table(), parts=Parts(7)))


def waited(own: RoundCosts, seconds: float, rounds: int, requests: int = 4) -> float:
    """Rounds that wait so long; what is expected then."""
    for _ in range(rounds):
        expected = float(own.draft(requests, 100.0, [link()], 7)[requests])
        own.drafted(Drafts(BLOCKS, seconds, 0.008), expected)
    return float(own.draft(requests, 100.0, [link()], 7)[requests])


def test_without_rounds_it_is_what_the_profile_says() -> None:
    seconds = costs().draft(4, 100.0, [link()], 7)
    assert seconds.tolist() == pytest.approx([0.0, 0.005, 0.006, 0.007, 0.008])


@pytest.mark.parametrize("seconds", [0.003, 0.008, 0.025])
def test_it_follows_what_rounds_wait(seconds: float) -> None:
    own = costs()
    assert waited(own, seconds, 12) == pytest.approx(seconds, rel=0.15)
    assert waited(own, seconds, 40) == pytest.approx(seconds, rel=0.02)


def test_single_slow_rounds_change_little() -> None:
    own = costs()
    usual = waited(own, 0.010, 60)
    assert waited(own, 0.5, 3) == pytest.approx(usual, rel=0.05)
    assert waited(own, 0.010, 5) == pytest.approx(usual, rel=0.05)


def test_rounds_without_blocks_teach_nothing() -> None:
    own = costs()
    own.drafted(Drafts({}, 0.5, 0.0), 0.008)
    assert own.draft(1, 100.0, [link()], 7)[1] == pytest.approx(0.005)


def shared(own: RoundCosts, steps: int, **others: int) -> None:
    """So many steps with others' rows in them."""
    for _ in range(steps):
        own.verified(4, 4, 100.0, 0.030, StepResult((), total_seconds=0.028, **others))


def test_company_is_the_sequences_of_others_and_not_their_drafts() -> None:
    own = costs()
    for rows, tokens in ((4, 4), (12, 7)):
        shared(own, 20, other_tokens=rows, other_sequences=4, other_gained=tokens)
        assert own.other_rows == rows
        assert own.company == 4
        assert own.other_gained == pytest.approx(tokens, abs=0.1)
    shared(own, 20)
    assert own.company == 0


def test_others_prompts_are_rows_at_their_price() -> None:
    own = costs()
    shared(own, 20, other_tokens=4 + 128, other_prompt_tokens=128, other_sequences=4, other_gained=4)
    assert own.company == 4
    own._prompt_row = 0.25
    shared(own, 40, other_tokens=4 + 128, other_prompt_tokens=128, other_sequences=4, other_gained=4)
    assert own.other_rows == 4 + 32


def test_a_step_that_met_nobody_changes_no_company() -> None:
    own = costs()
    shared(own, 20, other_tokens=4, other_sequences=4, other_gained=4)
    shared(own, 2)
    assert own.company == 4
