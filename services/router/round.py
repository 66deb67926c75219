"""One round on its way, as rows of arrays: what the scheduler knows of it, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dspark.messages import SequenceKey
from services.router.proposing import Ask
from services.router.scheduling.payoff import Decision
from services.router.scheduling.plan import Bools, Floats, Ints
from services.router.scheduling.policies import Outcome, Policy
from services.router.sequences import Sequence as Running

__all__ = ["Round", "Took"]


@dataclass(slots=True)
class Round:
    """One round on its way. Rows of arrays are the running sequences; blocks have up to n tokens.

    Attributes:
        running: sequences whose next step is a round.
        prompts, pieces: the others, and how many positions of each are computed beside the round.
        prompt_price: these positions, in rows that take as long.
        keys, prompt_keys: the sequences' as the round began; whoever has another by now has moved.
        policies: whom each running sequence's verify length goes by.
        context: mean committed length of the running sequences.
        most: (R,) draft tokens that may be verified.
        asked: (R,) who is to be drafted for; drafting: who of them has a drafter that can be asked.
        scheduled: (R,) whose policy looks at costs.
        explored: (R,) blocks verified as far as they were drafted, whatever they promise; `FREE` elsewhere.
        seconds: T over the step's rows, up to all that it may have.
        base_tokens: of the step without our drafts: one of each sequence, as if those with prompts decoded as well
            (what they wait for drafts they lose, too), and what other routers' rows yield.
        unhidden: seconds that the drafting of this round is expected to take.
        decision: what speculation may do at all; None where no sequence's policy looks at costs.
        held: (R,) whose features may wait at the verify worker; prompts_held: whether those of prompts may.
        plain: nothing of it has to do with drafts: all features wait, and did in the round before.
        catches_up: some are drafted for whose features or drafter it had to be waited for: their contexts are computed.
        reach: (R,) how much of a block is asked for at most, or comes unasked, where its policy leaves that to what
            blocks were worth lately; 0 elsewhere.
        once: (R,) drafted for in this round only, if at all: nobody is to stay with them.
        following: (R,) how much of the blocks after this round's is to come unasked.
        joining: (R,) wanted, but their blocks are to come unasked with the others', from the next round on.
        proposed: (R,) whether a block came. confidences: (R, n) as they came; corrected: as they are believed.
        alternatives: (R, n) what alternatives to drafts would bring.
        outcome: the lengths.
        tokens: expected of the round.
        kind: how most of the running sequences choose their tokens: "greedy", "coupled" or "rejection".
        begins: drafters were asked that stay from now on: rounds like it will take less.
    """

    running: list[Running]
    prompts: list[Running]
    pieces: list[int]
    prompt_price: int
    keys: list[SequenceKey]
    prompt_keys: list[SequenceKey]
    policies: list[Policy]
    context: float
    slots: Ints
    settings: Ints
    most: Ints
    asked: Bools
    scheduled: Bools
    explored: Ints
    before: Floats
    seconds: Floats
    base_tokens: float
    unhidden: float
    decision: Decision | None
    held: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    prompts_held: bool = False
    plain: bool = False
    catches_up: bool = False
    reach: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    once: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    joining: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    following: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    drafting: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    proposed: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))
    confidences: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    corrected: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    alternatives: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    outcome: Outcome | None = None
    tokens: float = 0.0
    kind: str = ""
    begins: bool = False

    @property
    def base_rows(self) -> int:
        """Rows of the step without drafts, those inside prompts at their price."""
        return len(self.running) + self.prompt_price

    @property
    def streams(self) -> int:
        """Those that run, and those that will as soon as their prompts are computed: all of them pay for a round."""
        return len(self.running) + len(self.prompts)

    @property
    def decode_seconds(self) -> Floats:
        """`seconds` from `base_rows` on, as if those with prompts decoded as well instead of having them computed.

        Prompts take their time in any case. Left in, it would hide what drafts cost: τ / T of a round that is long
        already hardly falls with rows that, without the prompts, would not be worth their time.
        """
        last = len(self.seconds) - 1
        prompts = self.seconds[min(self.base_rows, last)] - self.seconds[min(self.streams, last)]
        return np.asarray(self.seconds - float(prompts))

    @property
    def decodes(self) -> bool:
        """Whether it is a measure of decoding: not mostly prompts."""
        return sum(self.pieces) <= len(self.running) // 2

    @property
    def lengths(self) -> tuple[list[int], list[int], list[int]]:
        """By row: draft tokens to verify, how many of them may be kept, and whether a wanted block did not come."""
        assert self.outcome is not None
        missed = self.asked & ~self.proposed
        return self.outcome.verify.tolist(), self.outcome.commit.tolist(), missed.astype(int).tolist()

    @property
    def drafts(self) -> int:
        """Rows of drafts, and of alternatives to them, in the step."""
        if self.outcome is None:
            return 0
        beside = self.outcome.alternatives
        return int(self.outcome.verify.sum()) + (0 if beside is None else int(np.count_nonzero(beside)))

    def places(self, row: int) -> list[int]:
        """Of a request's drafts, from 1, those to which an alternative is verified."""
        beside = self.outcome.alternatives if self.outcome is not None else None
        return [] if beside is None else (np.flatnonzero(beside[row]) + 1).tolist()

    @property
    def capped(self) -> bool:
        """Whether more is verified than may be kept, which is for measuring and saves no time."""
        return self.outcome is not None and bool((self.outcome.commit < self.outcome.verify).any())

    @property
    def asks(self) -> list[Ask]:
        """What to ask the draft workers for."""
        rows = np.flatnonzero(self.asked | self.joining)
        want = np.where(self.asked, self.most, 0)
        return [Ask(self.running[row], int(want[row]), int(self.following[row])) for row in rows]


@dataclass(frozen=True, slots=True)
class Took:
    """What a round came to.

    Attributes:
        matched: (R,) draft tokens accepted, before anything cut them; -1 for a sequence without a verdict.
        alternatives: (R,) verified, the first ones of each request's.
        turned: (R,) whether the one to the first wrong draft was right.
        tokens: emitted in all.
        seconds: of the whole round, deciding included, without those behind other routers' steps.
        other_rows, other_prompt_rows: that other routers had in the step; those inside prompts among them.
        company, other_gained: sequences of theirs that got tokens, and how many.
        step_seconds, expected_seconds: of the step in the worker's engine.
        draft_seconds: that the round waited for its blocks.
    """

    matched: Ints
    tokens: int
    seconds: float
    other_rows: int = 0
    other_prompt_rows: int = 0
    company: int = 0
    other_gained: int = 0
    step_seconds: float = 0.0
    expected_seconds: float = 0.0
    draft_seconds: float = 0.0
    alternatives: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    turned: Bools = field(default_factory=lambda: np.zeros(0, np.bool_))

    @property
    def others_draft(self) -> bool:
        """Whether other routers had rows of drafts in the step."""
        return self.other_rows > self.company + self.other_prompt_rows
