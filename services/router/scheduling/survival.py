"""What confidences are worth at run time: survival tracked by position, and confidences corrected when they drift.

Kept by setting: the sampling mode (greedy, coupled, rejection) and the drafter, as each accepts differently. Only
earlier rounds enter, so a correction says nothing of the present tokens. What single sequences do is in `histories`.

A draft at position k is a trial where all before it were accepted and it was verified; given c_k its outcome does not
depend on having been admitted. From trials one shift b_k of the log-odds is followed for each position by recursive
Newton steps with forgetting: c'_k = sigmoid(logit c_k + b_k). It keeps the order within a position and, unlike a
factor, keeps probabilities probabilities. Drafts that a plan always cuts are seen through `explore`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from services.router.scheduling.plan import FREE, Bools, Floats, Ints, survival_of

__all__ = ["Mode", "Report", "Tracker", "explore", "logit", "sigmoid", "trials"]

Mode: TypeAlias = Literal["greedy", "coupled", "rejection"]

EDGE = 1e-6  # confidences are taken no nearer to 0 and 1
MOST = 4.0  # of a shift, in log-odds
PRIOR = 4.0  # information (Σ p(1-p)) that speaks for the confidences as they are: some 20 trials
HALF_LIFE = 2000.0  # trials of a position
ODD = 3.0  # standard deviations beyond which a round counts no further
EXPLORED = 8.0  # weight of a trial that only exploration let happen
UNKNOWN = 0.6  # c_k of a drafter without confidences, before anything is known
AVERAGED = 500.0  # blocks of half-life in the averages

_Setting: TypeAlias = tuple[Mode, str]


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x)."""
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def logit(p: Floats) -> Floats:
    """Log-odds of probabilities, which are kept off 0 and 1."""
    p = np.clip(p, EDGE, 1 - EDGE)
    return np.asarray(np.log(p / (1 - p)))


def trials(verified: Ints, accepted: Ints, width: int) -> tuple[Bools, Bools]:
    """(R, width) which positions were put to the test, and which of them were accepted."""
    position = np.arange(width)
    tested = position < np.minimum(verified, accepted + 1)[:, None]
    return tested, tested & (position < accepted[:, None])


def explore(room: Ints, generator: np.random.Generator, *, share: float = 1 / 64, rows: float = np.inf) -> Ints:
    """(R,) `FREE`, or for a few requests their whole block: `forced` lengths of a plan.

    Drawn independently of tokens and confidences, so that it is lossless in every mode and what it shows is unbiased.

    Args:
        room: (R,) from `limits`, known before anything is drafted.
        generator: seeded by the caller.
        share: of the requests.
        rows: that exploring may add to a step on average; the share shrinks to keep it.
    """
    share = min(share, rows / max(1, int(room.sum())))
    return np.where(generator.random(len(room)) < share, room, FREE).astype(np.int64)


def continued(chance: Floats, asked: Ints, expected: Floats) -> Floats:
    """(R, n) c_k, those behind the first `asked` (R,) as `expected` survivals, (R, n) or (1, n), have them.

    What was not asked for is no block that ended.
    """
    before = np.concatenate([np.ones((len(expected), 1)), expected[:, :-1]], axis=1)
    conditional = expected / np.maximum(before, 1e-9)
    return np.where(np.arange(chance.shape[1]) < asked[:, None], chance, conditional)


@dataclass(frozen=True, slots=True)
class Report:
    """One setting's figures by position, NaN where nothing was tried.

    Attributes:
        observed: (n,) survival by the outcomes, of recent trials.
        predicted: (n,) survival by the confidences of the same trials as they came.
        corrected: (n,) as they were corrected at the time.
        trials: (n,) recent trials.
        shift: (n,) b_k.
    """

    observed: Floats
    predicted: Floats
    corrected: Floats
    trials: Floats
    shift: Floats


class Tracker:
    """Every setting's survival. Rows of its arrays are settings, columns positions 1 … n."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._settings: dict[_Setting, int] = {}
        self._shift = np.zeros((0, block))
        self._information = np.zeros((0, block))
        self._sums = np.zeros((0, 4, block))  # trials, accepted, predicted, corrected
        self._average = np.zeros((0, block))
        self._averaged = np.zeros(0)

    def setting(self, mode: Mode, drafter: str) -> int:
        """The number of a setting, for the other methods' arrays; drafters by fingerprint."""
        if (mode, drafter) not in self._settings:
            self._settings[mode, drafter] = len(self._settings)
            self._shift = np.vstack([self._shift, np.zeros((1, self._block))])
            self._information = np.vstack([self._information, np.zeros((1, self._block))])
            self._sums = np.concatenate([self._sums, np.zeros((1, 4, self._block))])
            self._average = np.vstack([self._average, np.cumprod(np.full((1, self._block), UNKNOWN), axis=1)])
            self._averaged = np.append(self._averaged, 0.0)
        return self._settings[mode, drafter]

    @property
    def settings(self) -> dict[tuple[Mode, str], int]:
        """Those seen, by mode and drafter."""
        return dict(self._settings)

    # ------------------------------------------------------------ before a plan

    def corrected(self, settings: Ints, confidences: Floats, nudge: Floats | None = None) -> Floats:
        """(R, n) c'_k, 0 where nothing was proposed.

        Args:
            settings: (R,) numbers.
            confidences: (R, n) as the drafter gave them; 0 where nothing was proposed, NaN where it gives none.
            nudge: (R,) further shift of requests whose drafter gives none, from their own rounds (`histories`).
        """
        silent = np.isnan(confidences)
        odds = logit(np.where(silent, UNKNOWN, confidences)) + self._shift[settings, : confidences.shape[1]]
        if nudge is not None:
            odds += np.where(silent, nudge[:, None], 0.0)
        return np.where(silent | (confidences > 0), sigmoid(odds), 0.0)

    def average(self, settings: Ints) -> Floats:
        """(R, n) survival of a block of which nothing is known but its setting."""
        return np.asarray(self._average[settings])

    # ------------------------------------------------------------ after a round

    def observe(
        self,
        settings: Ints,
        confidences: Floats,
        verified: Ints,
        accepted: Ints,
        *,
        planned: Ints | None = None,
        asked: Ints | None = None,
    ) -> None:
        """Takes in a round.

        Args:
            settings: (R,) numbers; a row for each request with a proposal.
            confidences: (R, n) as of `corrected`.
            verified: (R,) draft tokens.
            accepted: (R,) of them.
            planned: (R,) verify lengths as they would have been without exploring. Trials beyond stand for the many
                that were cut, and weigh more.
            asked: (R,) draft tokens that the drafter was asked for; whole blocks unless given.
        """
        width = confidences.shape[1]
        raw = np.where(np.isnan(confidences), UNKNOWN, confidences)
        chance = self.corrected(settings, confidences)
        tested, success = trials(verified, accepted, width)
        beyond = np.zeros_like(tested) if planned is None else np.arange(width) >= planned[:, None]
        weight = np.where(tested, np.where(beyond, EXPLORED, 1.0), 0.0)
        for number in np.unique(settings):
            rows = settings == number
            self._count(number, np.stack([tested[rows], success[rows], (raw * tested)[rows], (chance * tested)[rows]]))
            self._follow(number, weight[rows], success[rows] - chance[rows], chance[rows])
            self._take_average(number, chance[rows], None if asked is None else asked[rows])

    def _count(self, number: int, figures: Floats) -> None:
        width = figures.shape[2]
        added = figures.sum(axis=1)
        sums = self._sums[number, :, :width]
        sums *= 0.5 ** (added[0] / HALF_LIFE)
        sums += added

    def _follow(self, number: int, weight: Floats, residual: Floats, chance: Floats) -> None:
        """One Newton step by position. A round's evidence is bounded, whatever went wrong in it."""
        width = weight.shape[1]
        variance = chance * (1 - chance)
        bound = ODD * np.sqrt((weight**2 * variance).sum(axis=0))
        evidence = np.clip((weight * residual).sum(axis=0), -bound, bound)
        information = self._information[number, :width]
        information *= 0.5 ** (weight.sum(axis=0) / HALF_LIFE)
        information += (weight * variance).sum(axis=0)
        shift = self._shift[number, :width]
        np.clip(shift + evidence / (information + PRIOR), -MOST, MOST, out=shift)

    def _take_average(self, number: int, chance: Floats, asked: Ints | None) -> None:
        """Of all blocks, also those that were cut: their confidences are known, only their outcomes are not."""
        width, count = chance.shape[1], len(chance)
        kept = self._averaged[number] * 0.5 ** (count / AVERAGED)
        average = self._average[number, :width]
        mean = survival_of(chance if asked is None else continued(chance, asked, average[None])).mean(axis=0)
        average += (mean - average) * count / (kept + count)
        self._averaged[number] = kept + count

    def report(self, number: int) -> Report:
        """A setting's figures, for metrics and logs."""
        count, accepted, predicted, corrected = self._sums[number]
        with np.errstate(invalid="ignore", divide="ignore"):
            observed, raw, chance = (np.cumprod(figure / count) for figure in (accepted, predicted, corrected))
        return Report(observed, raw, chance, trials=count.copy(), shift=self._shift[number].copy())
