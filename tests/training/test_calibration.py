"""Calibration finds a known truth, and its measures agree with counting by hand and with brute force."""

import math
import time
from dataclasses import replace

import pytest
import torch
from scipy.stats import mannwhitneyu
from support.outcomes import drifting, rounds_of

from dspark.errors import ConfigError
from dspark.models.drafters.calibration import Calibration, calibrations_to_json, parse_calibrations
from services.draft.confidence import Curves
from training.calibration import calibrate
from training.reliability import Report, auc, ece, ece_by_chance, prefix_survival, reliability
from training.rounds import Rounds


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def least_ece_by_temperature(rounds: Rounds) -> Calibration:
    """Sequential Temperature Scaling as published: a grid of temperatures, no bias."""
    chosen: list[float] = []
    for k in range(rounds.block_size):
        rows = rounds.drafted > k
        part = rounds.select(rows)

        def error(temperature: float, k: int = k, part: Rounds = part) -> float:
            rest = [1.0] * (part.block_size - k - 1)
            own = Calibration("coupled", (*chosen, temperature, *rest), (0.0,) * part.block_size)
            return ece(prefix_survival(part, own)[:, k], part.accepted > k)

        chosen.append(min(torch.logspace(-1, 1, 41).tolist(), key=error))
    return Calibration("coupled", tuple(chosen), (0.0,) * rounds.block_size)


def log_odds(calibration: Calibration, logits: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(Curves([calibration]).of(logits.double().numpy(), [0] * len(logits)))


def test_a_known_truth_is_found() -> None:
    """A head without noise, misread by a temperature and a bias: both come back, and products are calibrated."""
    rounds = drifting(60_000, seed=1, noise=0.0, scale=1.6, shift=0.9)
    found = calibrate(rounds, "rejection")
    usual = rounds.logits.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    assert log_odds(found, usual).numpy() == pytest.approx(((usual - 0.9) / 1.6).numpy(), abs=0.25)
    report = Report.of(drifting(60_000, seed=2, noise=0.0, scale=1.6, shift=0.9), found)
    assert report.worst_ece() < 0.01
    assert report.worst_ece(after=False) > 0.05


def test_noisy_heads_are_calibrated_where_temperatures_alone_are_not() -> None:
    """Raw confidence lies above 0.5 and the truth below: no temperature crosses, a bias does."""
    fitted, others = (drifting(count, seed=seed, level=-0.6, shift=1.4) for count, seed in ((30_000, 3), (60_000, 4)))
    ours = Report.of(others, calibrate(fitted, "coupled"))
    control = Report.of(others, least_ece_by_temperature(fitted))
    assert prefix_survival(others)[:, 0].mean() > 0.5 > (others.accepted > 0).double().mean()
    assert ours.mean_ece() < 0.006
    assert ours.worst_ece() < 0.012
    assert control.worst_ece() > 0.05
    for one in ours.positions:
        assert one.ece_after is not None
        assert one.ece_before is not None
        assert one.ece_after < one.ece_before / 3


def test_two_heaps_that_a_line_cannot_reach() -> None:
    """Half of all rounds repeat what was said and nearly always stand; the head tells them apart, and is too modest."""

    def heaps(count: int, seed: int) -> Rounds:
        random = torch.Generator().manual_seed(seed)
        quality, looping = torch.randn(count, 1, generator=random), torch.rand(count, 1, generator=random) < 0.5
        truth = -0.2 + 1.5 * quality + 4 * looping
        modest = torch.where(truth > 1.5, 1.5 + 0.35 * (truth - 1.5), truth)
        head = modest + 0.3 * torch.randn(count, 1, generator=random)
        return rounds_of(head, (torch.rand(count, 1, generator=random) < truth.sigmoid())[:, 0].long())

    others, found = heaps(100_000, 20), calibrate(heaps(30_000, 21), "greedy")
    line = min(
        Report.of(others, Calibration("greedy", (temperature,), (bias,))).worst_ece()
        for temperature in torch.logspace(-1, 0.5, 16).tolist()
        for bias in torch.linspace(-1, 2, 16).tolist()
    )
    assert found.bends[0]
    assert Report.of(others, found).worst_ece() < 0.009 < line / 2


def test_nothing_is_fitted_to_noise() -> None:
    """Where confidences are right, what is fitted on 3,000 rounds is about as right on others."""
    fitted = drifting(3_000, seed=5, noise=0.0, scale=1.0, shift=0.0)
    report = Report.of(drifting(200_000, seed=6, noise=0.0, scale=1.0, shift=0.0), calibrate(fitted, "greedy"))
    assert report.worst_ece(after=False) < 0.005
    assert report.worst_ece() < 0.02


def test_order_within_a_position_stays() -> None:
    rounds = drifting(2_000, seed=7)
    backwards = replace(rounds, logits=-rounds.logits)  # the likeliest slope would turn them over
    for one in (rounds, backwards):
        found = calibrate(one, "coupled")
        assert min(found.temperatures) > 0
        assert parse_calibrations(calibrations_to_json([found]), 5, "here") == (found,)
        for k in range(5):
            tried = one.accepted >= k
            before, outcome = one.logits[tried, k].double(), one.accepted[tried] > k
            after = log_odds(found, one.logits[tried])[:, k]
            assert (after[before.argsort()].diff() >= 0).all()
            assert auc(before, outcome) == pytest.approx(auc(after, outcome), abs=1e-9)
    report = Report.of(rounds, calibrate(rounds, "coupled"))
    assert report.positions[0].auc_before == report.positions[0].auc_after == report.positions[0].auc_single


def test_only_rounds_that_drafted_a_position_count_there() -> None:
    whole = drifting(20_000, seed=8)
    drafted = torch.randint(0, 6, (20_000,), generator=torch.Generator().manual_seed(9))
    unknown = torch.arange(5) >= drafted[:, None]
    cut = replace(
        whole,
        logits=whole.logits.masked_fill(unknown, torch.nan),
        accepted=whole.accepted.minimum(drafted),
        drafted=drafted,
    )
    report = Report.of(whole, calibrate(cut, "coupled"))
    assert report.worst_ece() < 0.02
    counted = Report.of(cut, calibrate(whole, "coupled"))
    assert [one.rounds for one in counted.positions] == [int((drafted >= k).sum()) for k in range(1, 6)]
    assert counted.worst_ece() < 0.03  # the last position has 4,000 rounds or so


def test_few_rounds_do_no_harm() -> None:
    nothing = calibrate(drifting(0, seed=0), "coupled")
    assert (nothing.temperatures, nothing.biases) == ((1.0,) * 5, (0.0,) * 5)
    assert math.isnan(Report.of(drifting(0, seed=0), nothing).mean_ece())
    for count in (1, 2, 7, 40):
        rounds = drifting(count, seed=count)
        found = calibrate(rounds, "coupled")
        assert all(0.2 < one < 5 for one in found.temperatures)
        assert all(abs(one) < 5 for one in found.biases)
        assert len(Report.of(rounds, found).to_json()["positions"]) == 5


@pytest.mark.parametrize("accepted", [0, 2, 5])
def test_positions_that_always_or_never_stand(accepted: int) -> None:
    logits = torch.randn(3_000, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1
    rounds = rounds_of(logits, torch.full((3_000,), accepted))
    report = Report.of(rounds, calibrate(rounds, "greedy"))
    assert report.worst_ece() < 0.01
    assert all(one.auc_after is None for one in report.positions)


@pytest.mark.parametrize(("scale", "shift"), [(0.002, 0.0), (60.0, 0.0), (1.0, 400.0), (0.0, 3.0), (0.05, 400.0)])
def test_logits_of_any_scale(scale: float, shift: float) -> None:
    """The head's units are its own: tiny, huge, far off, or all alike."""
    plain = drifting(5_000, seed=10, noise=0.5, scale=1.0, shift=0.0)
    found = calibrate(replace(plain, logits=plain.logits * scale + shift), "coupled")
    assert parse_calibrations(calibrations_to_json([found]), 5, "here") == (found,)
    report = Report.of(replace(plain, logits=plain.logits * scale + shift), found)
    assert report.worst_ece() < 0.06


def test_what_six_digits_cannot_tell_apart_can_be_read_back() -> None:
    plain = drifting(2_000, seed=10, noise=0.5, scale=1.0, shift=0.0)
    found = calibrate(replace(plain, logits=plain.logits * 0.0005 + 400), "coupled")
    assert parse_calibrations(calibrations_to_json([found]), 5, "here") == (found,)


def test_rounds_without_confidences_are_refused() -> None:
    rounds = drifting(20, seed=11)
    with pytest.raises(ConfigError, match="no confidences: their drafter has no confidence head"):
        calibrate(replace(rounds, logits=torch.full_like(rounds.logits, torch.nan)), "coupled")
    with pytest.raises(ConfigError, match="infinite confidence logits"):
        calibrate(replace(rounds, logits=rounds.logits.index_fill(0, torch.tensor([3]), torch.inf)), "coupled")


def test_a_hundred_thousand_rounds_take_seconds() -> None:
    rounds = drifting(100_000, seed=12, block=8)
    began = time.process_time()
    calibrate(rounds, "coupled")
    assert time.process_time() - began < 30  # some 5 s


def test_ece_by_hand() -> None:
    confidence = torch.tensor([0.9, 0.1, 0.2, 0.8])
    outcome = torch.tensor([True, False, True, True])
    # Two bins: {0.1, 0.2} of which half survive, {0.8, 0.9} which all do.
    assert ece(confidence, outcome, 2) == pytest.approx((2 * 0.35 + 2 * 0.15) / 4)
    assert [point.rounds for point in reliability(confidence, outcome, 3)] == [2, 1, 1]
    assert ece(confidence, outcome, 99) == pytest.approx((0.1 + 0.1 + 0.8 + 0.2) / 4)
    assert math.isnan(ece(confidence[:0], outcome[:0]))


def test_ties_share_their_outcomes() -> None:
    """One confidence for all: the error is its distance from the share, however the rounds are ordered."""
    confidence, outcome = torch.full((600,), 0.5), torch.arange(600) < 180
    assert ece(confidence, outcome) == pytest.approx(0.2)
    assert ece(confidence, outcome.flip(0)) == pytest.approx(0.2)
    assert auc(confidence, outcome) == 0.5


def test_ece_against_bins_counted_one_by_one() -> None:
    random = torch.Generator().manual_seed(13)
    confidence = torch.rand(1_003, generator=random, dtype=torch.float64)
    outcome = torch.rand(1_003, generator=random) < 0.3
    pairs = sorted(zip(confidence.tolist(), outcome.tolist(), strict=True))
    total, first = 0.0, 0
    for bin_ in range(15):
        size = 67 if bin_ < 1_003 % 15 else 66
        part = pairs[first : first + size]
        total += abs(sum(one for one, _ in part) - sum(hit for _, hit in part))
        first += size
    assert first == 1_003
    assert ece(confidence, outcome) == pytest.approx(total / 1_003)


def test_what_chance_makes_of_a_perfect_confidence() -> None:
    random = torch.Generator().manual_seed(14)
    confidence = torch.rand(5_000, generator=random, dtype=torch.float64)
    seen = [ece(confidence, torch.rand(5_000, generator=random) < confidence) for _ in range(40)]
    assert ece_by_chance(confidence) == pytest.approx(sum(seen) / 40, rel=0.08)


@pytest.mark.parametrize("digits", [1, 6])
def test_auc_against_scipy(digits: int) -> None:
    random = torch.Generator().manual_seed(15)
    confidence = torch.rand(500, generator=random).double().round(decimals=digits)
    outcome = torch.rand(500, generator=random) < confidence
    hits, misses = confidence[outcome].numpy(), confidence[~outcome].numpy()
    expected = mannwhitneyu(hits, misses).statistic / (len(hits) * len(misses))
    assert auc(confidence, outcome) == pytest.approx(expected, abs=1e-12)
    assert auc(confidence, torch.ones(500)) is None
    assert auc(torch.tensor([0.2, 0.9]), torch.tensor([0, 1])) == 1.0


def test_a_report_is_json() -> None:
    rounds = drifting(400, seed=16)
    found = Report.of(rounds, calibrate(rounds, "greedy")).to_json()
    assert (found["setting"], found["rounds"], found["texts"]) == ("greedy", 400, 40)
    assert found["mean_ece_after"] == pytest.approx(sum(one["ece_after"] for one in found["positions"]) / 5)
    assert found["worst_ece_before"] == max(one["ece_before"] for one in found["positions"])
    first, second = found["positions"][:2]
    assert first["survived"] == first["conditional"] == float((rounds.accepted > 0).double().mean())
    assert second["conditional"] == pytest.approx(rounds.conditional_acceptance()[1])
