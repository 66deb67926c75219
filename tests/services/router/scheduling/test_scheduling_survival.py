"""Tracking: drifts are followed, odd rounds are not, exploration is unbiased."""

import numpy as np
import pytest

from services.router.scheduling.histories import Histories
from services.router.scheduling.plan import FREE, Floats, Ints, early_stop, survival_of
from services.router.scheduling.survival import Tracker, explore, logit, sigmoid

N = 4


def outcomes(generator: np.random.Generator, truth: Floats, verified: Ints) -> Ints:
    """(R,) accepted: each position stands with its own chance, up to the first that does not."""
    stands = generator.random(truth.shape) < truth
    return np.asarray(np.minimum(np.cumprod(stands, axis=1).sum(axis=1), verified), np.int64)


def play(
    tracker: Tracker, setting: int, rounds: int, shift: Floats, *, silent: bool = False, requests: int = 16
) -> None:
    generator = np.random.default_rng(7)
    numbers, verified = np.full(requests, setting), np.full(requests, N)
    for _ in range(rounds):
        confidences = generator.beta(4, 2, (requests, N))
        accepted = outcomes(generator, sigmoid(logit(confidences) + shift), verified)
        tracker.observe(numbers, np.full_like(confidences, np.nan) if silent else confidences, verified, accepted)


def test_a_drift_is_recovered_by_position() -> None:
    tracker, shift = Tracker(N), np.array([-1.0, 0.0, 0.7, -0.5])
    setting = tracker.setting("coupled", "d")
    play(tracker, setting, 600, shift)
    report = tracker.report(setting)
    assert report.shift == pytest.approx(shift, abs=0.25)
    assert report.corrected == pytest.approx(report.observed, abs=0.03)
    assert abs(report.predicted - report.observed).max() > 0.1
    play(tracker, setting, 600, np.zeros(N))  # and back
    assert tracker.report(setting).shift == pytest.approx(np.zeros(N), abs=0.25)


def test_settings_are_apart() -> None:
    tracker = Tracker(N)
    one, other = tracker.setting("rejection", "d"), tracker.setting("coupled", "d")
    assert tracker.setting("rejection", "d") == one
    play(tracker, one, 300, np.full(N, -1.0))
    assert tracker.report(other).shift.tolist() == [0] * N
    assert tracker.corrected(np.array([other]), np.array([[0.5, 0.5, 0.0, 0.0]]))[0] == pytest.approx([0.5, 0.5, 0, 0])


def test_order_is_kept_and_nothing_proposed_stays_nothing() -> None:
    tracker = Tracker(N)
    setting = tracker.setting("greedy", "d")
    play(tracker, setting, 200, np.full(N, -2.0))
    confidences = np.array([[0.1, 0.2, 0.0, 0.0], [0.9, 0.99, 1.0, 0.0]])
    got = tracker.corrected(np.full(2, setting), confidences)
    assert ((got == 0) == (confidences == 0)).all()
    assert (got[1, :2] > got[0, :2]).all()
    assert (got <= 1).all()


def test_a_few_odd_rounds_change_little() -> None:
    tracker = Tracker(N)
    setting = tracker.setting("coupled", "d")
    play(tracker, setting, 400, np.zeros(N))
    before = tracker.report(setting).shift
    for _ in range(3):  # everything is rejected, whatever it promised
        tracker.observe(np.full(64, setting), np.full((64, N), 0.95), np.full(64, N), np.zeros(64, np.int64))
    assert abs(tracker.report(setting).shift - before).max() < 0.1


def test_a_drafter_without_confidences_gets_its_averages() -> None:
    tracker = Tracker(N)
    setting = tracker.setting("coupled", "ngram")
    generator, truth = np.random.default_rng(0), np.array([0.8, 0.5, 0.9, 0.3])
    for _ in range(400):
        accepted = outcomes(generator, np.tile(truth, (16, 1)), np.full(16, N))
        tracker.observe(np.full(16, setting), np.full((16, N), np.nan), np.full(16, N), accepted)
    numbers = np.array([setting])
    assert tracker.corrected(numbers, np.full((1, N), np.nan))[0] == pytest.approx(truth, abs=0.06)
    assert tracker.average(numbers)[0] == pytest.approx(np.cumprod(truth), abs=0.06)


def test_exploring_is_independent_and_bounded() -> None:
    generator, room = np.random.default_rng(5), np.full(640, 7)
    drawn = np.array([explore(room, generator) for _ in range(400)])
    assert set(np.unique(drawn)) == {FREE, 7}
    shares = (drawn == 7).mean(axis=0)
    assert shares.mean() == pytest.approx(1 / 64, rel=0.1)
    assert shares.std() < 3 * np.sqrt(1 / 64 / 400)  # nobody is preferred
    bounded = np.array([np.maximum(explore(room, generator, rows=20), 0).sum() for _ in range(1000)])
    assert bounded.mean() == pytest.approx(20, rel=0.15)
    again = [explore(room, np.random.default_rng(9)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_exploration_shows_what_trimming_hides() -> None:
    """Position 4 is always cut, and worth far more than it promises: only explored blocks can tell."""
    seconds = 1 + 0.3 * np.maximum(0, np.arange(400) - 34.0)  # room for about two drafts each
    shifts = {}
    for share in (0.0, 1 / 16):
        generator, tracker = np.random.default_rng(2), Tracker(N)
        numbers = np.full(16, tracker.setting("coupled", "d"))
        for _ in range(800):
            confidences = np.clip(generator.normal([0.9, 0.8, 0.4, 0.2], 0.03, (16, N)), 0.01, 0.99)
            plan = early_stop(survival_of(confidences), seconds, 16)
            explored = explore(np.full(16, N), generator, share=share)
            verified = np.where(explored >= 0, explored, plan.lengths)
            truth = sigmoid(logit(confidences) + np.array([0, 0, 0, 2.0]))
            accepted = outcomes(generator, truth, verified)
            tracker.observe(numbers, confidences, verified, accepted, planned=plan.lengths)
        assert plan.lengths.max() < N
        shifts[share] = tracker.report(0).shift[-1]
    assert shifts[0.0] == 0
    assert shifts[1 / 16] == pytest.approx(2.0, abs=0.5)


# ---------------------------------------------------------------- single sequences


def test_a_sequence_is_known_by_its_own_rounds_and_forgotten() -> None:
    tracker = Tracker(N)
    setting = tracker.setting("coupled", "d")
    histories = Histories(tracker, N, slots=1)
    slots = np.array([histories.join(setting) for _ in range(3)])
    assert histories.predicted(slots) == pytest.approx(tracker.average(histories.settings(slots)))
    chance = np.repeat([[0.9], [0.3]], N, axis=1)
    for _ in range(12):
        histories.observe(slots[:2], chance, np.array([4, 4]), np.array([3, 0]))
    predicted = histories.predicted(slots)
    assert predicted[0] == pytest.approx(0.9 ** np.arange(1, 5), abs=0.03)
    assert histories.before(slots)[1] == pytest.approx(0.3 ** np.arange(1, 5))
    assert histories.lengths(slots).tolist() == [3, 0, 0]
    for _ in range(200):
        histories.skipped(slots)
    assert histories.predicted(slots)[0] == pytest.approx(tracker.average(np.array([setting]))[0], abs=0.01)
    histories.leave(slots[0])
    assert histories.join(setting) == slots[0]
    assert histories.lengths(slots)[0] == 0


def test_sequences_of_a_silent_drafter_differ_by_what_they_accepted() -> None:
    tracker = Tracker(N)
    setting = tracker.setting("coupled", "ngram")
    histories, generator = Histories(tracker, N), np.random.default_rng(0)
    slots = np.array([histories.join(setting) for _ in range(2)])
    silent, verified = np.full((2, N), np.nan), np.full(2, N)
    for _ in range(80):
        chance = tracker.corrected(histories.settings(slots), silent, histories.nudge(slots))
        accepted = outcomes(generator, np.repeat([[0.85], [0.35]], N, axis=1), verified)
        histories.observe(slots, chance, verified, accepted)
        tracker.observe(histories.settings(slots), silent, verified, accepted)
    chance = tracker.corrected(histories.settings(slots), silent, histories.nudge(slots))
    assert chance[0, 0] > chance[1, 0] + 0.2
    predicted = histories.predicted(slots)
    assert predicted[0].sum() > predicted[1].sum() + 0.5
    histories.move(slots[0], tracker.setting("coupled", "other"))
    assert histories.nudge(slots)[0] == 0
