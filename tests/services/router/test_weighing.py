"""What a scheduler makes of rounds: when a decision stands for the next ones, and whose tokens count where routers
share a verify worker."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dspark.messages import SequenceKey
from services.router.memory import Memory
from services.router.options import Options
from services.router.resting import RESTED, Rest
from services.router.round import Round, Took
from services.router.scheduler import Scheduler
from services.router.scheduling.allowance import GRACE
from services.router.scheduling.payoff import ENOUGH, Decision
from services.router.scheduling.plan import FREE
from services.router.scheduling.policies import Adaptive, Outcome

STREAMS, BLOCK = 4, 5


def sequences(count: int = STREAMS) -> list[Any]:
    return [
        SimpleNamespace(
            key=SequenceKey(f"s{n}", 0), chosen=0, committed_len=100 + n, slot=n, setting=0, standing=0, left=100
        )
        for n in range(count)
    ]


def a_round(running: list[Any], *, drafted: bool = False, **changed: Any) -> Round:
    """A round of plain decoding, or one that drafts for everybody and verifies two of each block."""
    count = len(running)
    flags, lengths = np.full(count, drafted), np.full(count, 2 * drafted)
    made = Round(
        running=running,
        prompts=[],
        pieces=[],
        prompt_price=0,
        keys=[s.key for s in running],
        prompt_keys=[],
        policies=[Adaptive()] * count,
        context=100.0,
        slots=np.arange(count),
        settings=np.zeros(count, np.int64),
        most=np.full(count, BLOCK),
        asked=flags,
        scheduled=np.ones(count, np.bool_),
        explored=np.full(count, FREE),
        before=np.zeros((count, BLOCK)),
        seconds=np.full(64, 0.025),
        base_tokens=float(count),
        unhidden=0.0,
        decision=Decision(BLOCK),
        plain=not drafted,
        drafting=flags,
        proposed=np.zeros(count, np.bool_),
        following=lengths,
        once=np.zeros(count, np.bool_),
        outcome=Outcome(lengths, lengths, lengths),
    )
    return replace(made, **changed)


# ---------------------------------------------------------------- a decision stands


def test_a_decision_to_draft_for_nobody_stands_for_some_rounds() -> None:
    rest, running = Rest(), sequences()
    assert rest.again(running, []) is None
    rest.decided(a_round(running))
    for count in range(1, RESTED + 1):
        running[0].committed_len += 4
        round_ = rest.again(running, [])
        assert round_ is not None
        assert round_.context == 101.5 + count
        assert rest.rounds == count + 1
    assert rest.again(running, []) is None
    rest.decided(a_round(running))
    assert rest.rounds == 1


@pytest.mark.parametrize("change", ["one left", "one came", "another epoch", "a prompt"])
def test_who_comes_or_goes_is_decided_for_at_once(change: str) -> None:
    rest, running = Rest(), sequences()
    rest.decided(a_round(running))
    after = {
        "one left": running[1:],
        "one came": sequences(STREAMS + 1),
        "another epoch": [*running[1:], SimpleNamespace(key=SequenceKey("s0", 1), committed_len=1)],
        "a prompt": running,
    }[change]
    assert rest.again(after, sequences(1) if change == "a prompt" else []) is None
    assert rest.again(running, []) is not None


@pytest.mark.parametrize(
    "busy",
    [
        {"drafted": True},
        {"plain": False},
        {"decision": Decision(BLOCK, probe=True)},
        {"prompts": sequences(1)},
    ],
)
def test_whatever_goes_on_is_decided_every_round(busy: dict[str, Any]) -> None:
    rest, running = Rest(), sequences()
    rest.decided(a_round(running, **busy))
    assert rest.again(running, []) is None


def unasked(count: int = STREAMS) -> list[Any]:
    """Everybody's blocks come unasked."""
    running = sequences(count)
    for sequence in running:
        sequence.standing = sequence.chosen = BLOCK
    return running


def drafting(running: list[Any], **changed: Any) -> Round:
    """A round that goes on drafting for them as before."""
    own: dict[str, Any] = {"following": np.full(len(running), BLOCK), "kind": "coupled"}
    return a_round(running, drafted=True, **(own | changed))


def test_a_decision_to_go_on_drafting_for_everybody_stands_for_some_rounds() -> None:
    rest, running = Rest(), unasked()
    rest.decided(drafting(running))
    for _ in range(RESTED):
        round_ = rest.again(running, [])
        assert round_ is not None
        assert round_.asked.all()
    assert rest.again(running, []) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "rejection"},
        {"explored": np.array([FREE, 3, FREE, FREE])},
        {"once": np.arange(STREAMS) == 1},
        {"asked": np.arange(STREAMS) != 1},
        {"scheduled": np.arange(STREAMS) != 1},
        {"most": np.full(STREAMS, 2)},
        {"following": np.full(STREAMS, 2)},
        {"following": np.zeros(STREAMS, np.int64)},
        {"decision": Decision(BLOCK, probe=True)},
    ],
)
def test_drafts_that_are_to_change_are_decided_every_round(changed: dict[str, Any]) -> None:
    rest, running = Rest(), unasked()
    rest.decided(drafting(running, **changed))
    assert rest.again(running, []) is None


def test_a_look_and_who_is_to_be_let_go_are_decided_every_round() -> None:
    rest, running = Rest(), unasked()
    running[1].chosen = 0  # not by costs: a look, or a block that comes unasked for the last time
    rest.decided(drafting(running))
    assert rest.again(running, []) is None


@pytest.mark.parametrize("change", [{"standing": 0}, {"standing": 2}, {"left": BLOCK + 1}])
def test_who_loses_a_drafter_or_nears_the_end_is_decided_for_at_once(change: dict[str, int]) -> None:
    rest, running = Rest(), unasked()
    rest.decided(drafting(running))
    running[2] = SimpleNamespace(**(vars(running[2]) | change))
    assert rest.again(running, []) is None
    assert rest.again(unasked(), []) is not None


def test_a_round_without_sequences_never_stands() -> None:
    rest = Rest()
    rest.decided(a_round([]))
    assert rest.again([], []) is None


def test_a_wish_that_has_to_last_is_looked_at_every_round() -> None:
    rest, running = Rest(), sequences()
    running[2].chosen = 1
    rest.decided(a_round(running))
    assert rest.again(running, []) is None


# ---------------------------------------------------------------- what rounds were worth


class Costs:
    """Steps of 20 ms and 1 ms a row, whosever rows they are."""

    known = True

    def price(self, prompt_rows: int) -> int:
        return prompt_rows // 4

    def joined(self, rows: int, _context: float) -> float:
        return 0.020 + 0.001 * rows


def scheduler() -> Scheduler:
    costs: Any = Costs()
    return Scheduler(costs, Memory(BLOCK), {}, lambda _: True, Options(verify_length=BLOCK), attach=lambda: None)


def took(seconds: float, tokens: int = STREAMS, **others: Any) -> Took:
    return Took(np.zeros(STREAMS, np.int64), tokens, seconds, **others)


def test_plain_rounds_beside_another_routers_drafts_say_nothing_of_plain_decoding() -> None:
    made, running = scheduler(), sequences()
    for _ in range(20):  # it waits for the other's drafts, and for their rows
        made.learn(a_round(running), took(0.056, other_rows=10, company=4, other_gained=7))
    assert made.payoff.plain == 1.0
    for _ in range(20):  # some of theirs were not in the step
        made.learn(a_round(running), took(0.056, other_rows=4, company=4, other_gained=4))
    assert 1.9 < made.payoff.plain <= 2.0


def test_rounds_beside_another_routers_prompts_say_nothing_of_drafts() -> None:
    made, running = scheduler(), sequences()
    others = {"other_rows": 4 + 128, "other_prompt_rows": 128, "company": 4, "other_gained": 4}
    for _ in range(3 * ENOUGH):
        made.learn(a_round(running, drafted=True), took(0.180, 7, **others))
    assert made.payoff.advantage == 0.0
    assert made.weighing.decide(BLOCK, 1, 1).limit == BLOCK


@pytest.mark.parametrize(("others", "pays"), [({"other_rows": 4, "company": 4, "other_gained": 4}, False), ({}, True)])
def test_drafts_are_weighed_with_the_other_routers_sequences_that_wait_for_them(
    others: dict[str, int], *, pays: bool
) -> None:
    made, running = scheduler(), sequences()
    for _ in range(3 * ENOUGH):  # 7 + 4 tokens for 8 in 28 ms, or 7 for 4 in 24
        made.learn(a_round(running, drafted=True), took(0.040, 7, **others))
    assert (made.payoff.limit == BLOCK) is pays


# ---------------------------------------------------------------- what drafts may lose


def learned(made: Scheduler, *, rounds: int, seconds: float, step: float = 0.028, **changed: Any) -> int:
    """The limit after so many rounds with drafts that had 7 tokens for the 4 of a plain one, which takes 24 ms."""
    running = sequences()
    for _ in range(rounds):
        came = replace(took(seconds, 7), step_seconds=step, expected_seconds=0.028)
        made.learn(a_round(running, drafted=True, **changed), came)
    return made.weighing.decide(BLOCK, 1, 1).limit


def test_rounds_that_lose_end_drafting_before_any_evidence_does() -> None:
    assert learned(scheduler(), rounds=ENOUGH - 2, seconds=0.040) == BLOCK
    made = scheduler()
    assert learned(made, rounds=ENOUGH - 2, seconds=0.062) == 0
    assert made.payoff.limit == BLOCK


def test_what_a_drafters_first_rounds_take_is_counted_and_is_no_evidence() -> None:
    made = scheduler()
    assert learned(made, rounds=4, seconds=0.100, begins=True) == BLOCK  # they may pay later
    assert learned(made, rounds=8, seconds=0.044) == 0  # 1.75 for 1.83: a little less than plain decoding
    assert made.payoff.advantage == pytest.approx(-0.045, abs=0.01)


def test_what_one_kind_of_batch_loses_ends_no_other_kinds_drafts() -> None:
    made = scheduler()
    assert learned(made, rounds=ENOUGH - 2, seconds=0.062, kind="coupled") == BLOCK  # asked for another kind
    assert made.weighing.decide(BLOCK, 1, 1, kind="coupled").limit == 0
    assert made.weighing.decide(BLOCK, 1, 1, kind="greedy").limit == BLOCK


def test_what_a_step_takes_beyond_what_was_expected_tells_of_the_machine() -> None:
    assert learned(scheduler(), rounds=ENOUGH - 2, seconds=0.080, step=0.028 + 0.044) == BLOCK
    assert learned(scheduler(), rounds=ENOUGH - 2, seconds=0.080, step=0.028) == 0


PLAIN = {"other_rows": 4, "company": 4, "other_gained": 4}
DRAFTS = {"other_rows": 12, "company": 4, "other_gained": 7}


@pytest.mark.parametrize(
    ("others", "tokens", "limit"),
    [(PLAIN, 7, 0), (PLAIN, 15, BLOCK), (DRAFTS, 7, 0), (DRAFTS, 12, BLOCK)],
)
def test_beside_another_router_drafts_are_charged_with_what_all_would_have_had(
    others: dict[str, int], tokens: int, limit: int
) -> None:
    made = scheduler()
    for _ in range(4 * ENOUGH):  # of 64 ms, where plain decoding for all eight takes 28
        made.learn(a_round(sequences(), drafted=True, decision=Decision(BLOCK, load=8)), took(0.064, tokens, **others))
        if not made.weighing.decide(BLOCK, 8, 1).limit:
            break
    assert made.weighing.decide(BLOCK, 8, 1).limit == limit


def test_another_routers_drafts_are_on_nobodys_account_here() -> None:
    made = scheduler()
    for _ in range(3 * ENOUGH):  # ours have just ended, and features are still sent
        made.learn(a_round(sequences(), plain=False), took(0.100, **DRAFTS))
    assert made.weighing.decide(BLOCK, 1, 1).limit == BLOCK


def test_what_was_lost_is_paid_off_beside_another_routers_drafts_too() -> None:
    """Else each of two would keep the other from trying again."""
    made = scheduler()
    assert learned(made, rounds=ENOUGH - 2, seconds=0.062) == 0
    for _ in range(400):
        made.learn(a_round(sequences()), took(0.056, **DRAFTS))
    assert made.weighing.decide(BLOCK, 1, 1).limit == BLOCK


def test_the_load_that_is_decided_for_is_everybodys() -> None:
    made = scheduler()
    made.costs.company = 4  # type: ignore[misc]
    assert made._load(sequences(), 3) == STREAMS + 3 + 4


def test_drafts_of_a_policy_of_their_own_are_on_nobodys_account() -> None:
    made, mixed = scheduler(), np.array([True, True, True, False])
    for _ in range(3 * ENOUGH):
        made.learn(a_round(sequences(), drafted=True, drafting=~mixed, scheduled=mixed), took(0.100, 7))
    assert made.weighing.decide(BLOCK, 1, 1).limit == BLOCK
    lost = scheduler()
    assert learned(lost, rounds=ENOUGH - 2, seconds=0.062) == 0
    assert lost.weighing.decide(BLOCK, 1, 1, bounded=False).limit == BLOCK


def test_whole_blocks_verified_for_measuring_are_not_charged() -> None:
    made = scheduler()
    cut = Outcome(np.full(STREAMS, BLOCK), np.full(STREAMS, 1), np.full(STREAMS, BLOCK))
    assert learned(made, rounds=ENOUGH - 2, seconds=0.060, outcome=cut) == BLOCK


def reopened(made: Scheduler) -> int:
    """Plain rounds until somebody may be drafted for again."""
    rounds = 0
    while not made.weighing.decide(BLOCK, 1, 1).limit:
        made.learn(a_round(sequences()), took(0.024))
        rounds += 1
    return rounds


def test_what_has_won_for_long_is_soon_tried_again() -> None:
    made = scheduler()
    learned(made, rounds=4 * ENOUGH, seconds=0.034)
    for _ in range(GRACE + 8):  # drafters begin again and again, which no evidence counts
        learned(made, rounds=1, seconds=0.120, begins=True)
    assert made.payoff.wins
    never = scheduler()
    assert learned(never, rounds=ENOUGH - 2, seconds=0.062) == 0
    assert 0 < reopened(made) < reopened(never) / 2


def test_plain_rounds_pay_off_what_was_lost() -> None:
    made = scheduler()
    assert learned(made, rounds=ENOUGH - 2, seconds=0.062) == 0
    limits = []
    for _ in range(400):
        made.learn(a_round(sequences()), took(0.024))
        limits.append(made.weighing.decide(BLOCK, 1, 1).limit)
    assert limits == sorted(limits)
    assert {0, BLOCK} == set(limits)
