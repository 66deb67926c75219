"""What a round with one verify worker costs as the router lives it: the engines' own seconds, and what lies between.

A round's time is T_verify(rows) + hop + T_draft(requests) + hop. The engines' parts come from their profiles, refined
by the steps this router saw; a hop is what a call took beyond its engine's part: transport, waiting for features, not
a step's wait for those of other routers. Whether that time is well spent is the scheduler's question.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

import numpy as np

from dspark.messages import StepResult
from services.router.links import DraftLink, VerifierLink
from services.router.proposing import Drafts
from services.router.scheduling.plan import Floats

__all__ = ["RoundCosts"]

WINDOW = 25  # rounds that a hop is the median of
OFF_WINDOW = 13  # rounds with drafts that say how far expected drafting times are off
PRESUMED = 5  # of these, at first, presumed not to be
JUDGED = 0.75  # of a step's rows, at least, for its time to tell what verifying costs
OTHERS_PACE = 0.25
COMPANY = 8  # steps, of which the one most shared says whom ours are shared with: not every one meets them
PROMPT_PACE = 0.1


class _Median:
    """Of the last seconds; 0 before the first."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.value = 0.0

    def add(self, seconds: float) -> None:
        self._values.append(max(0.0, seconds))
        self.value = statistics.median(self._values)


class RoundCosts:
    """Of the rounds with one verify worker. All seconds; tables are over whole numbers from 0."""

    def __init__(self, link: VerifierLink) -> None:
        self._link = link
        self._verify_hop = _Median()
        self._draft_hop = _Median()
        self._draft_engine = _Median()  # where a draft worker has no profile
        self._draft_off = deque([0.0] * PRESUMED, OFF_WINDOW)  # log of observed over expected
        self._others = self._gained = 0.0
        self._company = deque([0], COMPANY)
        self._prompt_row = 1.0

    @property
    def known(self) -> bool:
        """Whether the verify worker has shown what its steps cost."""
        return self._link.costs is not None

    @property
    def other_rows(self) -> int:
        """Rows that other routers have in the steps with ours, lately."""
        return round(self._others)

    @property
    def company(self) -> int:
        """Other routers' sequences that get tokens in the steps with ours, lately."""
        return max(self._company)

    @property
    def other_gained(self) -> float:
        """Tokens that these get in a step."""
        return self._gained

    def price(self, prompt_rows: int) -> int:
        """Judged rows that take as long as so many rows inside prompts, which go through the layers only."""
        return round(prompt_rows * self._prompt_row)

    def verify(self, rows: int, context: float) -> Floats:
        """(rows + 1,) T + hop of steps with 0 … rows of our own rows, beside those of others."""
        if self._link.costs is None:
            return np.ones(rows + 1)
        others = self.other_rows
        return self._link.costs.table(rows + others, context)[others:] + self._verify_hop.value

    def step(self, rows: int, context: float) -> float:
        """The engine's seconds for a step with so many rows of ours; 0 where nothing is known."""
        return self._link.costs.predict(rows + self.other_rows, context) if self._link.costs is not None else 0.0

    def joined(self, rows: int, context: float) -> float:
        """T + hop of a step with so many rows in all, whosever they are; 0 where nothing is known."""
        return self._link.costs.predict(rows, context) + self._verify_hop.value if self._link.costs is not None else 0.0

    def draft(self, requests: int, context: float, links: Iterable[DraftLink], tokens: int) -> Floats:
        """(requests + 1,) T + hop of drafting for 0 … requests, spread over the workers; drafting for none is free.

        `tokens`: how many of each block.
        """
        links = list(links)
        seconds = np.zeros(requests + 1)
        if links and requests:
            share = -(-np.arange(requests + 1) // len(links))
            tables = [self._of_drafter(link, int(share[-1]), context)[share] * link.parts.of(tokens) for link in links]
            seconds[1:] = (np.max(tables, axis=0)[1:] + self._draft_hop.value) * self._draft_factor
        return seconds

    @property
    def _draft_factor(self) -> float:
        """Rounds on busy cores wait longer than engine and hop would take apart, and those told unasked less."""
        return math.exp(statistics.median(self._draft_off))

    def _of_drafter(self, link: DraftLink, requests: int, context: float) -> Floats:
        if link.costs is None:
            return np.full(requests + 1, self._draft_engine.value)
        return link.costs.table(requests, context)

    # ------------------------------------------------------------ after a round

    def drafted(self, drafts: Drafts, expected: float) -> None:
        """Takes in a round of proposals that came in time, and the seconds that were expected of it; 0: none were.

        The first rounds of drafters that stay are passed over: they are not what drafting goes on to cost.
        """
        if drafts.proposals and not drafts.begins:
            self._draft_engine.add(drafts.engine_seconds)
            self._draft_hop.add(drafts.seconds - drafts.engine_seconds)
            if expected > 0 and drafts.seconds > 0:
                self._draft_off.append(math.log(drafts.seconds / expected * self._draft_factor))

    def verified(self, rows: int, judged: int, context: float, seconds: float, result: StepResult) -> None:
        """Takes in a step: our rows, those of them that verdicts came from, and what the call took."""
        prompts = result.other_prompt_tokens
        all_judged, all_rows = judged + result.other_tokens - prompts, rows + result.other_tokens
        self._learn_prompts(all_rows - all_judged, all_judged, context, result.total_seconds)
        self._others += OTHERS_PACE * (result.other_tokens - prompts + self.price(prompts) - self._others)
        self._gained += OTHERS_PACE * (result.other_gained - self._gained)
        self._company.append(result.other_sequences)
        self._verify_hop.add(seconds - result.total_seconds - result.queue_seconds)
        if self._link.costs is not None and all_judged >= JUDGED * all_rows:
            self._link.costs.observe(all_rows, context, result.total_seconds)

    def _learn_prompts(self, prompt_rows: int, judged: int, context: float, seconds: float) -> None:
        """From steps of mostly prompt rows: how many judged rows would have taken as long."""
        if self._link.costs is None or prompt_rows <= judged:
            return
        table = np.maximum.accumulate(self._link.costs.table(judged + 2 * prompt_rows, context))
        like = int(np.searchsorted(table, seconds))
        found = min(max(0.0, (like - judged) / prompt_rows), 2.0)
        self._prompt_row += PROMPT_PACE * (found - self._prompt_row)
