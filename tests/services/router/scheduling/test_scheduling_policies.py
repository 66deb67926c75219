"""Policies by name, and the lengths they give."""

import numpy as np
import pytest

from dspark.errors import ConfigError
from services.router.scheduling.plan import FREE
from services.router.scheduling.policies import Adaptive, CapAccept, Facts, Fixed, NoDrafts, Threshold, parse

CONFIDENCES = np.array([[0.9, 0.8, 0.4, 0.9], [0.95, 0.9, 0.0, 0.0], [0.3, 0.9, 0.9, 0.9]])
SECONDS = 1 + 0.12 * np.arange(40.0)


def facts(**changes: object) -> Facts:
    given = {"confidences": CONFIDENCES, "most": np.array([4, 4, 1]), "seconds": SECONDS, "base_rows": 3}
    return Facts(**(given | changes))  # type: ignore[arg-type]


def test_names() -> None:
    assert parse("none") == NoDrafts()
    assert parse(" fixed:3") == Fixed(3)
    assert parse("threshold:0.6") == Threshold(0.6)
    assert parse("adaptive") == Adaptive()
    assert parse("cap-accept") == CapAccept()
    assert [parse(name).needs_costs for name in ("none", "fixed:2", "threshold:1", "adaptive", "cap-accept")] == [
        *[False] * 3,
        *[True] * 2,
    ]
    assert [parse(name).ask(5) for name in ("none", "fixed:3", "fixed:9", "adaptive")] == [0, 3, 5, 5]


@pytest.mark.parametrize(
    "name", ["", "fixed", "fixed:", "fixed:-1", "fixed:x", "threshold:1.5", "threshold:nan", "adaptive:", "best"]
)
def test_unknown_names_are_refused_with_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"fixed:N.*threshold:X.*cap-accept"):
        parse(name)


def test_static_rules() -> None:
    assert NoDrafts().outcome(facts()).verify.tolist() == [0, 0, 0]
    assert Fixed(3).outcome(facts()).verify.tolist() == [3, 2, 1]
    assert Threshold(0.5).outcome(facts()).verify.tolist() == [2, 2, 0]
    assert Threshold(0.0).outcome(facts()).verify.tolist() == [4, 2, 1]
    full = facts(seconds=SECONDS[:7])  # three rows for drafts
    assert Fixed(3).outcome(full).verify.tolist() == [1, 1, 1]
    assert Fixed(3).outcome(facts(static=np.array([0, FREE, FREE]))).verify.tolist() == [0, 2, 1]


def test_adaptive_heeds_static_rules_and_exploration() -> None:
    plain = Adaptive().outcome(facts())
    assert plain.plan is not None
    assert plain.verify.sum() < 7
    assert plain.verify.tolist() == plain.commit.tolist() == plain.planned.tolist()
    mixed = Adaptive().outcome(facts(static=np.array([FREE, 0, FREE]), explored=np.array([4, 4, FREE])))
    assert mixed.verify[:2].tolist() == [4, 0]  # a request's own rule comes first
    assert mixed.planned[0] < 4


@pytest.mark.parametrize("rejection", [False, True])
def test_cap_accept_verifies_all_and_keeps_the_window(rejection: bool) -> None:
    before = np.cumprod(np.full((3, 4), 0.8), axis=1)
    given = facts(rejection=rejection, before=before)
    window, outcome = Adaptive().outcome(given), CapAccept().outcome(given)
    assert outcome.verify.tolist() == [4, 2, 1]
    assert outcome.commit.tolist() == window.verify.tolist()
    tight = CapAccept().outcome(facts(seconds=SECONDS[:6]))
    assert tight.verify.sum() <= 2
    assert (tight.commit <= tight.verify).all()
