"""Decides a cohort's rounds: for whom to draft, then how much of each block to verify; and learns from what came of it.

Brings rows of arrays (`rows.py`) together with what `services.router.scheduling` makes of them. Knows neither how
proposals come nor what a verify worker is told. What decides about drafting is known before anything is drafted, and
what decides about verifying follows the batch's strictest sampling mode (DSpark §3.2.2, Appendix A).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np

from dspark.messages import Proposal
from services.router.cohort import Cohort
from services.router.costs import RoundCosts
from services.router.holding import Holding
from services.router.links import DraftLink
from services.router.memory import Memory
from services.router.options import Options
from services.router.resting import Rest
from services.router.round import Round, Took
from services.router.rows import (
    by_rejection,
    coming,
    confidences,
    fresh,
    kind_of,
    most_of,
    most_promising,
    offered,
    shortening,
    standing,
    unattached,
)
from services.router.scheduling.looks import Looks
from services.router.scheduling.payoff import Payoff
from services.router.scheduling.plan import FREE, Bools, Floats, Ints, survival_of
from services.router.scheduling.policies import Facts, Outcome, mixed
from services.router.scheduling.reach import Blocks, Reach
from services.router.scheduling.survival import explore
from services.router.scheduling.whom import whom_to_draft
from services.router.sequences import Sequence as Running
from services.router.shares import level
from services.router.weighing import Weighing

__all__ = ["Scheduler"]

EXPLORED_ROWS = 0.02  # of a step's streams, that exploring may add rows for on average
LOOKED = 4  # requests drafted for in a look: whether drafting pays is seen of any number
SPARED = 2  # rounds in a row that would not draft for a sequence, before its drafter leaves it
IDLE_EXPLORED_ROWS = 0.005  # the same while drafting pays for nobody: then a draft is asked for to be explored


class Scheduler:
    """Of the rounds with one verify worker.

    Args:
        costs: of these rounds.
        memory: what earlier rounds say of drafts, shared by a router's cohorts.
        drafters: the connected draft workers, a live view.
        able: whether a sequence can be drafted for now.
        options: of the router.
        attach: called where sequences are to have a drafter that had none because nobody drafted.
    """

    def __init__(
        self,
        costs: RoundCosts,
        memory: Memory,
        drafters: Mapping[str, DraftLink],
        able: Callable[[Running], bool],
        options: Options,
        *,
        attach: Callable[[], None],
    ) -> None:
        self.costs = costs
        self._memory = memory
        self._drafters = drafters
        self._able = able
        self._options = options
        self._attach = attach
        self._random = np.random.default_rng(options.seed)
        self._longest = options.verify_length
        self.weighing = Weighing(costs, self._longest)
        self._looks = Looks()
        self._holding = Holding()
        self._reaches: dict[str, Reach] = defaultdict(Reach)  # by kind of batch
        self._rest = Rest()

    @property
    def payoff(self) -> Payoff:
        """Whether speculation pays at the present load."""
        return self.weighing.payoff

    def quiet(self, streams: int) -> bool:
        """Whether nobody is drafted for while there are about so many streams: a new one needs no drafter yet."""
        return self._holding.quiet(streams)

    # ------------------------------------------------------------ before anything is drafted

    def begin(self, cohort: Cohort) -> Round:
        """Who takes part in the next round, and for whom to draft: from earlier rounds only."""
        running, prompts = cohort.running(), cohort.prompts()
        round_ = self._rest.again(running, prompts)
        if round_ is None:
            round_ = self._decided(cohort, running, prompts)
            self._rest.decided(round_)
        return round_

    def _decided(self, cohort: Cohort, running: list[Running], prompts: list[Running]) -> Round:
        rows = cohort.link.max_step_tokens
        free = rows - len(running)
        pieces = level([p.uncomputed for p in prompts], min(free, self._options.prefill_tokens) if running else free)
        price = self.costs.price(sum(pieces))
        policies = [s.request.policy or self._options.policy for s in running]
        block = self._block()
        scheduled = np.array([policy.needs_costs for policy in policies], np.bool_)
        decision, kind = None, kind_of(running)
        if scheduled.any():
            bounded = bool(scheduled.all())
            decision = self._holding.decision or self.weighing.decide(
                block, self._load(running, price), self._rest.rounds, kind=kind, bounded=bounded
            )
        context = sum(s.committed_len for s in running) / max(1, len(running))
        slots, settings = self._memory.rows(running)
        most = most_of(running, policies, scheduled, block, decision)
        round_ = Round(
            running=running,
            prompts=prompts,
            pieces=pieces,
            prompt_price=price,
            keys=[s.key for s in running],
            prompt_keys=[s.key for s in prompts],
            policies=policies,
            context=context,
            slots=slots,
            settings=settings,
            most=most,
            asked=most > 0,
            scheduled=scheduled,
            explored=np.full(len(running), FREE),
            before=self._memory.histories.before(slots)[:, :block],
            seconds=self.costs.verify(max(len(running) + price, rows - sum(pieces) + price), context),
            base_tokens=len(running) + len(prompts) + self.costs.other_gained,
            unhidden=0.0,
            decision=decision,
            once=np.zeros(len(running), np.bool_),
            kind=kind,
        )
        if most.any():
            self._wish(round_, block)
        else:  # choosing would take a hundredth of a round of many
            _wish_nothing(round_)
        round_.drafting = round_.asked & self._draftable(round_)
        if self._holding.settle(round_, coming(round_)):
            self._attach()
        round_.unhidden = self._unhidden(round_)
        return round_

    def _load(self, running: list[Running], price: int) -> int:
        """Rows before any drafts: what drafts win is a matter of everybody's in the step."""
        return len(running) + price + self.costs.company

    def _block(self) -> int:
        """Draft tokens of the longest block at hand, or that was: a round without its drafter counts as missed."""
        blocks = [link.drafter.block_size for link in self._drafters.values() if link.alive]
        self._longest = max(blocks, default=self._longest)
        return min(self._options.verify_length, self._longest)

    def _draft_seconds(self, requests: int, context: float, tokens: int) -> Floats:
        links = [link for link in self._drafters.values() if link.alive]
        return self.costs.draft(requests, context, links, tokens)

    def _unhidden(self, round_: Round) -> float:
        """Seconds that the drafting of a round will take."""
        if not round_.drafting.any():
            return 0.0
        longest = int(round_.most[round_.drafting].max())
        seconds = self._draft_seconds(len(round_.running), round_.context, longest)
        return float(seconds[np.count_nonzero(round_.drafting)])

    def _wish(self, round_: Round, block: int) -> None:
        """For whom to draft, how much, and whose blocks are to come unasked."""
        if round_.scheduled.any():
            self._choose(round_, block)
        self._shorten(round_, block)
        self._join(round_)

    def _choose(self, round_: Round, block: int) -> None:
        """Among those whose policy looks at costs; the others are drafted for as they wish."""
        able, scheduled = self._draftable(round_), round_.scheduled
        if self._holding.all_postponed:
            self._holding.resume(round_, scheduled & able)
            return
        usual = np.where(
            shortening(round_), np.minimum(round_.most, self._reaches[round_.kind].usual(block)), round_.most
        )
        open_ = np.arange(block) < np.where(scheduled & able, usual, 0)[:, None]
        predicted = np.where(open_, self._memory.histories.predicted(round_.slots)[:, :block], 0.0)
        takes = shortening(round_)[:, None] & (not any(map(by_rejection, round_.running)))  # as `policies` has it
        beside = np.where(open_ & takes, self._memory.expected(round_, predicted), 0.0)
        chosen = whom_to_draft(
            np.concatenate([predicted, beside], axis=1),
            round_.decode_seconds,
            self._draft_seconds(len(round_.running), round_.context, int(usual.max(initial=0))),
            round_.base_rows,
            base_tokens=round_.base_tokens,
        )
        may = able & scheduled & (round_.most > 0)
        if not chosen.any() and not round_.prompts and self.payoff.wins:  # rounds say otherwise than costs
            chosen = may
        if round_.decision is None or not round_.decision.probe:
            chosen = self._holding.lasting(round_, chosen)
        pays = bool(chosen.any())  # what is wished for in one round and not in the next is not seen to pay
        share = self._rest.rounds * (EXPLORED_ROWS if chosen.any() else IDLE_EXPLORED_ROWS)
        load = self._load(round_.running, round_.prompt_price)
        if may.any() and round_.decodes and self._looks.due(load, self._rest.rounds, pays=pays):
            chosen = most_promising(round_, predicted, may, LOOKED)
        room = np.where(scheduled & able, round_.most, 0)
        explored = explore(room, self._random, share=self._options.explore, rows=share * round_.streams)
        round_.explored = self._holding.explored(round_, np.where(room > 0, explored, FREE))
        wanted = np.where(scheduled & able, chosen | (round_.explored > 0) | self._holding.postponed(round_), True)
        staying = standing(round_)  # what comes unasked is drafted already, so using it is free
        round_.asked = (round_.most > 0) & (wanted | (staying > 0))
        whole = (staying == 0) | (round_.explored < 0)
        round_.explored = np.where(whole, round_.explored, np.minimum(round_.explored, staying))
        round_.once = scheduled & able & ~chosen & (staying == 0)
        for sequence, own in zip(round_.running, wanted, strict=True):
            sequence.spared = 0 if own else sequence.spared + 1

    def _shorten(self, round_: Round, block: int) -> None:
        """Ask for no more than is worth it, but of those whose whole block is explored; what stays, stays."""
        probe = round_.decision is not None and round_.decision.probe
        here, short = standing(round_), shortening(round_)
        staying = here * (not probe)  # a probe tries longer blocks than come unasked
        free = short & (round_.explored < 0)
        usual = self._reaches[round_.kind].next(block)
        round_.reach = np.where(free, np.where(staying > 0, staying, usual), 0)
        leaving = np.array([s.spared >= SPARED for s in round_.running], np.bool_)
        longest = np.where(short, np.minimum(usual, round_.most), round_.most)
        round_.following = np.where(leaving | round_.once | (probe & (here == 0)), 0, longest)
        bound = np.where(free, round_.reach, np.where(short & (staying > 0), staying, block))
        round_.most = np.minimum(round_.most, bound)

    def _join(self, round_: Round) -> None:
        """What is asked for comes after what comes unasked: who joins the others is drafted for a round later."""
        here = standing(round_)
        known = np.array([s.followed and s.steady >= 0 for s in round_.running], np.bool_) & (round_.following > 0)
        others = bool((round_.asked & (here > 0)).any())
        round_.joining = round_.asked & (here == 0) & known & self._ables(round_) & others
        round_.asked = round_.asked & ~round_.joining

    def _ables(self, round_: Round) -> Bools:
        return np.array([self._able(s) for s in round_.running], np.bool_)

    def _draftable(self, round_: Round) -> Bools:
        """(R,) who can be drafted for: now, or where that is only done if it pays once it is attached."""
        attachable = unattached(round_) & round_.scheduled & any(link.alive for link in self._drafters.values())
        return self._ables(round_) | attachable

    # ------------------------------------------------------------ once the blocks are there

    def plan(self, round_: Round, proposals: Mapping[str, Proposal]) -> None:
        """Verify lengths of the blocks that came."""
        width = max(round_.before.shape[1], 1)
        if not round_.asked.any():
            _without_drafts(round_, width)
            return
        blocks = [fresh(s, proposals) for s in round_.running]
        round_.proposed = np.array([block is not None for block in blocks], np.bool_)
        round_.confidences = confidences(blocks, width)
        round_.corrected = self._memory.corrected(round_)
        round_.alternatives = self._memory.alternatives(round_, offered(blocks, width))
        facts = Facts(
            confidences=round_.corrected,
            most=round_.most,
            seconds=round_.decode_seconds,
            base_rows=round_.base_rows,
            unhidden=round_.unhidden if round_.proposed.any() else 0.0,
            rejection=any(by_rejection(s) for s, own in zip(round_.running, round_.proposed, strict=True) if own),
            before=np.where(round_.asked[:, None], round_.before, 0.0) if round_.before.shape[1] == width else None,
            explored=round_.explored,
            base_tokens=round_.base_tokens,
            alternatives=round_.alternatives if round_.alternatives.any() else None,
        )
        round_.outcome = mixed(round_.policies, facts)
        survival, beside = survival_of(round_.corrected, round_.outcome.verify), round_.outcome.alternatives
        more = 0.0 if beside is None else float(round_.alternatives[beside].sum())
        round_.tokens = len(round_.running) + float(survival.sum()) + more

    # ------------------------------------------------------------ once the verdicts are there

    def learn(self, round_: Round, took: Took) -> None:
        """What the round came to, for the rounds to come."""
        rows = self._memory.learn(round_, took)
        if len(rows):
            self._see_reach(round_, rows, took)
        self.weighing.learn(round_, took, int(np.count_nonzero(took.matched >= 0)))

    def _see_reach(self, round_: Round, rows: Ints, took: Took) -> None:
        """Of those whose blocks it may shorten."""
        assert round_.outcome is not None
        rows = rows[round_.reach[rows] > 0]
        if not len(rows) or not round_.decodes or round_.begins or round_.catches_up:
            return
        drafts, last = round_.drafts, len(round_.seconds) - 1
        base = min(round_.base_rows, last)
        more = max(0.0, float(round_.seconds[min(base + drafts, last)] - round_.seconds[base]))
        requests = int(np.count_nonzero(round_.proposed))
        self._reaches[round_.kind].observe(
            Blocks(
                taken=survival_of(round_.corrected[rows], round_.outcome.planned[rows]),
                asked=round_.most[rows],
                requests=requests,
                drafting=took.draft_seconds,
                row=more / max(1, drafts),
                beside=took.seconds - took.draft_seconds - more,
                base=round_.base_tokens,
            )
        )


def _wish_nothing(round_: Round) -> None:
    """Nobody may have anything verified, so nobody is drafted for or goes on waiting to be."""
    round_.joining = np.zeros(len(round_.running), np.bool_)
    for sequence in round_.running:
        sequence.chosen = 0
        sequence.spared += 1


def _without_drafts(round_: Round, width: int) -> None:
    """As every policy has it where nothing was asked for."""
    count = len(round_.running)
    lengths = np.zeros(count, np.int64)
    round_.proposed = np.zeros(count, np.bool_)
    round_.confidences = round_.corrected = np.zeros((count, width))
    round_.outcome = Outcome(lengths, lengths, lengths)
    round_.tokens = float(count)
