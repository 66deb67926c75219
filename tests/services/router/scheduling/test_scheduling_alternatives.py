"""What alternatives bring, which of them a plan takes, and how often they were right."""

import itertools

import numpy as np
import pytest

from services.router.scheduling.alternatives import SHARE, Shares, worth
from services.router.scheduling.plan import FREE, Floats, choose, freshest, survival_of
from services.router.scheduling.policies import Adaptive, CapAccept, Facts, Fixed, mixed
from services.router.scheduling.whom import NEAR, whom_to_draft


def blocks(seed: int, requests: int = 3, width: int = 3) -> tuple[Floats, Floats, np.random.Generator]:
    generator = np.random.default_rng(seed)
    survival = survival_of(generator.random((requests, width)) ** 0.5)
    return survival, worth(survival, np.full(requests, 0.3)), generator


def test_an_alternative_counts_where_only_its_draft_was_wrong() -> None:
    survival = survival_of(np.array([[0.5, 0.8, 0.1], [0.9, 0.0, 0.0]]))
    value = worth(survival, np.array([0.3, 0.2]))
    assert value[0] == pytest.approx([0.3 * 0.5, 0.3 * 0.5 * 0.2, 0.04])  # the last: no more than its draft brings
    assert value[1] == pytest.approx([0.2 * 0.1, 0.0, 0.0])  # none where nothing was proposed


@pytest.mark.parametrize("seed", range(30))
def test_the_best_plan_over_all_drafts_and_alternatives(seed: int) -> None:
    survival, value, generator = blocks(seed, requests=2)
    seconds, rows = 1 + np.cumsum(generator.random(9) ** 3), 2
    best = 0.0
    for lengths in itertools.product(range(4), repeat=2):
        beside = [np.arange(3) < length for length in lengths]
        for picked in itertools.product(
            *(itertools.product(*[[False, True] if on else [False] for on in own]) for own in beside)
        ):
            taken = np.array(picked, np.bool_)
            used = rows + sum(lengths) + int(taken.sum())
            if used < len(seconds):
                tokens = (
                    2 + sum(float(survival[r, :n].sum()) for r, n in enumerate(lengths)) + float(value[taken].sum())
                )
                best = max(best, tokens / seconds[used])
    plan = freshest(survival, seconds, rows, alternatives=value)
    assert plan.goodput == pytest.approx(best)


@pytest.mark.parametrize("seed", range(30))
def test_none_is_verified_without_its_draft_and_all_fit(seed: int) -> None:
    survival, value, generator = blocks(seed, requests=4)
    forced = np.where(generator.random(4) < 0.3, 2, FREE)
    plan = choose(survival, np.ones(14), 4, rejection=False, forced=forced, alternatives=value)
    if plan.alternatives is not None:
        places = np.arange(1, 4) * plan.alternatives
        assert (places.max(axis=1) <= plan.lengths).all()
        assert not plan.alternatives[forced >= 0].any()
        assert int(plan.lengths.sum() + plan.alternatives.sum()) <= 9


def test_ties_go_to_drafts() -> None:
    survival = np.array([[0.5, 0.25]])
    plan = freshest(survival, np.array([1.0, 1.0, 1.0, 1.0, 9.0]), 1, alternatives=survival.copy())
    assert plan.lengths.tolist() == [1]
    assert plan.alternatives is not None
    assert plan.alternatives.tolist() == [[True, False]]


def test_rejection_has_none() -> None:
    survival, value, _ = blocks(0)
    for before in (None, survival):
        assert choose(survival, np.ones(40), 3, rejection=True, before=before, alternatives=value).alternatives is None


def test_only_adaptive_takes_them() -> None:
    confidences = np.full((2, 3), 0.6)
    facts = Facts(
        confidences=confidences,
        most=np.full(2, 3),
        seconds=np.ones(40),
        base_rows=2,
        alternatives=worth(survival_of(confidences), np.full(2, 0.3)),
    )
    taken = Adaptive().outcome(facts).alternatives
    assert taken is not None
    assert taken.all()
    assert Fixed(3).outcome(facts).alternatives is None
    assert CapAccept().outcome(facts).alternatives is None
    beside = mixed([Fixed(3), Adaptive()], facts).alternatives
    assert beside is not None
    assert beside.any(axis=1).tolist() == [False, True]


def test_shares_follow_what_was_seen_of_settings_that_have_any() -> None:
    shares, settings = Shares(), np.array([0, 1])
    assert shares.of(settings).tolist() == [0.0, 0.0]
    shares.offered(np.array([1]))
    assert shares.of(settings).tolist() == [0.0, SHARE]
    generator = np.random.default_rng(0)
    for _ in range(3000):
        shares.observe(np.array([1]), generator.random(1) < 0.1)
    assert shares.of(settings)[1] == pytest.approx(0.1, abs=0.03)


def test_what_comes_near_the_best_is_drafted_for_but_never_where_nobody_is_better() -> None:
    predicted = np.array([[0.6, 0.3], [0.55, 0.3], [0.5, 0.2]])
    seconds, drafting = 1 + 0.1 * np.arange(20), np.array([0.0, 0.10, 0.15, 0.25])
    theta = {
        count: max(
            (3 + float(np.sort(predicted[:count].ravel())[::-1][:rows].sum())) / (seconds[3 + rows] + drafting[count])
            for rows in range(2 * count + 1)
        )
        for count in range(4)
    }
    best = max(theta, key=lambda count: theta[count])
    near = max(count for count in range(1, 4) if theta[count] >= max((1 - NEAR) * theta[best], theta[0]))
    assert int(whom_to_draft(predicted, seconds, drafting, 3).sum()) == near
    dear = np.array([0.0, 0.15, 0.19, 0.60])  # one or two a little better than nobody, all of them worse
    chosen = int(whom_to_draft(predicted, seconds, dear, 3).sum())
    assert chosen < 3
