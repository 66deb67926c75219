"""Sequences and their blocks as rows of arrays, which is what `services.router.scheduling` reasons about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from dspark.messages import Mode, Proposal
from services.router.round import Round
from services.router.scheduling.payoff import Decision
from services.router.scheduling.plan import Bools, Floats, Ints, limits
from services.router.scheduling.policies import Policy
from services.router.sequences import Sequence as Running

__all__ = [
    "by_rejection",
    "coming",
    "confidences",
    "fresh",
    "kind_of",
    "most_of",
    "most_promising",
    "offered",
    "shortening",
    "standing",
    "unattached",
]


def kind_of(running: Sequence[Running]) -> str:
    """How most of them choose their tokens: "greedy", or by a mode's name; "" for nobody."""
    kinds = Counter("greedy" if s.request.sampling.greedy else s.request.sampling.mode.value for s in running)
    return max(kinds, key=lambda kind: (kinds[kind], kind), default="")


def most_of(
    running: Sequence[Running], policies: Sequence[Policy], scheduled: Bools, block: int, decision: Decision | None
) -> Ints:
    """(R,) draft tokens that each may have verified: the request's limits, its policy's, and what pays at all."""
    pays = decision.limit if decision is not None else block
    caps = [
        min(policy.ask(block), block if s.request.max_verify_length is None else s.request.max_verify_length)
        for s, policy in zip(running, policies, strict=True)
    ]
    return limits(
        np.array([s.left for s in running], np.int64),
        block,
        caps=np.where(scheduled, np.minimum(caps, pays), caps).astype(np.int64),
        speculation=np.array([s.request.speculation for s in running], np.bool_),
    )


def shortening(round_: Round) -> Bools:
    """(R,) whose policy asks for no more of a block than is worth it."""
    return np.array([policy.shortens for policy in round_.policies], np.bool_)


def standing(round_: Round) -> Ints:
    """(R,) draft tokens that come unasked."""
    return np.array([s.standing for s in round_.running], np.int64)


def coming(round_: Round) -> Bools:
    """(R,) who is to be drafted for and has a drafter that is not late, or soon will."""
    prompt = [s.drafter is not None and (s.attaching or s.drafter.late is None) for s in round_.running]
    return (round_.asked | round_.joining) & (np.array(prompt, np.bool_) | unattached(round_))


def unattached(round_: Round) -> Bools:
    """(R,) who has no drafter yet but gets one, or would if it were to be drafted for."""
    return np.array([s.drafter is None and (s.attaching or s.dormant) for s in round_.running], np.bool_)


def most_promising(round_: Round, predicted: Floats, able: Bools, count: int) -> Bools:
    """(R,) those of the able who are drafted for already, and then those whose blocks should survive longest."""
    chosen, length = np.zeros(len(able), np.bool_), np.where(able, predicted.sum(axis=1), -1.0)
    chosen[np.lexsort((-length, standing(round_) == 0))[:count]] = True
    return chosen & able


def fresh(sequence: Running, proposals: Mapping[str, Proposal]) -> Proposal | None:
    """The proposal, if it is for where the sequence is now."""
    proposal = proposals.get(sequence.sequence_id)
    if proposal is None or (proposal.key, proposal.committed_len) != (sequence.key, sequence.committed_len):
        return None
    return proposal


def confidences(blocks: Sequence[Proposal | None], width: int) -> Floats:
    """(R, width) c_k; 0 past what was proposed, NaN where the drafter gives none."""
    table = np.zeros((len(blocks), width))
    for row, block in enumerate(blocks):
        if block is not None:
            count = min(width, len(block.tokens))
            known = block.confidences[:count]
            table[row, :count] = np.maximum(known, 1e-6) if len(known) == count else np.nan
    return table


def offered(blocks: Sequence[Proposal | None], width: int) -> Bools:
    """(R, width) where a drafter named another token beside its draft."""
    table = np.zeros((len(blocks), width), np.bool_)
    for row, block in enumerate(blocks):
        if block is not None and block.alternatives:
            pairs = list(zip(block.tokens, block.alternatives, strict=True))[:width]
            table[row, : len(pairs)] = [token != other for token, other in pairs]
    return table


def by_rejection(sequence: Running) -> bool:
    """Whether its drafts are accepted or rejected by chance, so that no decision about them may know them."""
    sampling = sequence.request.sampling
    return sampling.mode is Mode.REJECTION and not sampling.greedy
