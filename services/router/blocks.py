"""Blocks that came: what a drafter got wrong about one, and what a batch of them tells of drafting's costs."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.messages import Mode, Proposal, ProposeItem, ProposeResult
from services.router.links import DraftLink
from services.router.sequences import Sequence as Running

__all__ = ["fault_of", "learn"]

ALIKE = 0.75  # of a batch's blocks, at least, are as long as the longest where its time tells what such blocks take


def learn(link: DraftLink, served: Sequence[ProposeItem], result: ProposeResult) -> None:
    """Whole blocks are what was profiled; of shorter ones it is learned what part of that they take."""
    if link.costs is None or not served:
        return
    longest = min(max(item.max_tokens for item in served), link.drafter.block_size)
    if sum(item.max_tokens >= longest for item in served) < ALIKE * len(served):
        return  # whole blocks beside short ones are neither
    requests = len(served) + result.other_requests
    context = sum(item.committed_len for item in served) / len(served)
    if longest == link.drafter.block_size:
        link.costs.observe(requests, context, result.total_seconds)
    elif not result.other_requests:  # of others' blocks it is not known how long they were
        link.parts.observe(longest, result.total_seconds / link.costs.predict(requests, context))


def fault_of(sequence: Running, item: ProposeItem, proposal: Proposal) -> str | None:
    """What a drafter got wrong, if anything: a broken one must not break streams."""
    if proposal.committed_len != item.committed_len:
        return f"for committed_len {proposal.committed_len}, asked at {item.committed_len}"
    if len(proposal.tokens) > item.max_tokens:
        return f"{len(proposal.tokens)} tokens, asked for {item.max_tokens}"
    if proposal.alternatives and len(proposal.alternatives) != len(proposal.tokens):
        return f"{len(proposal.alternatives)} alternatives to {len(proposal.tokens)} tokens"
    if any(token >= sequence.model.info.vocab_size for token in (*proposal.tokens, *proposal.alternatives)):
        return "a token outside the vocabulary"
    sampling = sequence.request.sampling
    needs = sampling.mode is Mode.REJECTION and not sampling.greedy
    if needs and len(proposal.distributions) != len(proposal.tokens):
        return f"{len(proposal.distributions)} distributions for {len(proposal.tokens)} tokens"
    return None
