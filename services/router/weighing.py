"""What rounds were worth beside plain decoding, and what that leaves for the next one to try.

Brings a round's figures to `payoff`, which says how long blocks may be, and to `allowance`, which says whether there
may be any; of each kind of batch on its own, as greedy drafts mostly stand and sampled ones do not. Tokens are those of
all routers that waited for the round, and seconds the whole round's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from services.router.costs import RoundCosts
from services.router.round import Round, Took
from services.router.scheduling.allowance import Allowance
from services.router.scheduling.payoff import Decision, Payoff, Payoffs

__all__ = ["Weighing"]

SURPRISE = 1.25  # what a step took beyond so many times what was expected tells of the machine, not of drafts


@dataclass(slots=True)
class _Scales:
    """Of one kind of batch."""

    payoffs: Payoffs
    allowance: Allowance = field(default_factory=Allowance)


class Weighing:
    """The state of one cohort, whose blocks have up to `block` draft tokens."""

    def __init__(self, costs: RoundCosts, block: int) -> None:
        self._costs = costs
        self._block = block
        self._kinds: dict[str, _Scales] = {}
        self._kind = ""

    @property
    def payoff(self) -> Payoff:
        """Whether speculation pays for the kind and size of load that was last decided for."""
        return self._of(self._kind).payoffs.now

    def decide(self, block: int, load: int, rounds: int, *, kind: str = "", bounded: bool = True) -> Decision:
        """What the next round may do.

        Args:
            block: draft tokens of a whole block.
            load: rows before any drafts, other routers' included.
            rounds: since it was last asked.
            kind: of the batch, as `Round.kind`.
            bounded: everybody's drafts are the scheduler's; beside others' it does not show what these lose.
        """
        if self._block != block:
            self._block, self._kinds = block, {}
        self._kind, scales = kind, self._of(kind)
        return scales.payoffs.decide(load, rounds, allowed=not bounded or scales.allowance.open(load))

    def _of(self, kind: str) -> _Scales:
        return self._kinds.setdefault(kind, _Scales(Payoffs(self._block)))

    def learn(self, round_: Round, took: Took, judged: int) -> None:
        """What a round came to that gave verdicts on so many sequences."""
        if not judged or not round_.decodes or round_.decision is None or not self._costs.known:
            return
        if took.other_prompt_rows > (judged + took.company) // 2:
            return  # beside others' prompts neither drafts nor plain decoding show what they take
        prompts = self._costs.price(took.other_prompt_rows)
        plain_seconds = self._costs.joined(round_.base_rows + took.company + prompts, round_.context)
        if plain_seconds > 0:
            self._weigh(round_, took, round_.decision, judged + took.company, plain_seconds)

    def _weigh(self, round_: Round, took: Took, decision: Decision, plain_tokens: int, plain_seconds: float) -> None:
        payoff = self._of(round_.kind).payoffs.of(decision)
        tokens = took.tokens + took.other_gained
        drafted = bool((round_.drafting & round_.scheduled).any())
        plain = round_.plain and not took.others_draft
        usual = not round_.begins and not round_.catches_up
        ours = drafted or round_.plain or not took.others_draft  # else it is theirs to pay for
        if ours and round_.scheduled.all():
            seconds = (took.seconds - _surprise(took)) / (plain_seconds * payoff.plain)
            self._account(round_, payoff, tokens / plain_tokens, seconds, usual=usual and drafted)
        if (drafted or plain) and usual:
            payoff.observe(
                decision,
                drafted=drafted,
                tokens=tokens,
                seconds=took.seconds,
                plain_tokens=plain_tokens,
                plain_seconds=plain_seconds,
            )

    def _account(self, round_: Round, payoff: Payoff, gained: float, took: float, *, usual: bool) -> None:
        """Of a round all of whose drafts were the scheduler's. `gained`, `took`: over a plain one's tokens and seconds.

        Beside other routers' rows they are everybody's.
        """
        assert round_.decision is not None
        load, allowance = round_.decision.load, self._of(round_.kind).allowance
        if round_.plain:
            allowance.plain(load, forgone=payoff.advantage if payoff.wins else 0.0)
        elif not round_.capped:
            allowance.tried(load, gained=gained, took=took, usual=usual)


def _surprise(took: Took) -> float:
    """Seconds of a step that its costs do not account for."""
    return max(0.0, took.step_seconds - SURPRISE * took.expected_seconds)
