"""Messages between router and draft worker."""

from __future__ import annotations

from collections.abc import Sequence

from dspark import messages as m
from dspark.errors import DSparkError, InvalidRequest
from dspark.rpc.codec.base import decode, decode_error, encode, encode_error, key_of
from dspark.v1 import draft_pb2 as pb


def attach_call(sequences: Sequence[m.AttachSequence]) -> pb.DraftRequest:
    """A session's request to draft for sequences from now on; the session fills in the call_id."""
    return pb.DraftRequest(attach=pb.AttachSequences(sequences=[encode(sequence) for sequence in sequences]))


def propose_call(items: Sequence[m.ProposeItem], wait_seconds: float) -> pb.DraftRequest:
    """A session's request for one block each; `wait_seconds` bounds the wait for features."""
    batch = pb.ProposeBatch(items=[encode(item) for item in items], wait_seconds=wait_seconds)
    return pb.DraftRequest(propose=batch)


def detach_call(keys: Sequence[m.SequenceKey]) -> pb.DraftRequest:
    """A session's request to forget sequences."""
    sequences = [pb.DetachSequence(sequence_id=key.sequence_id, epoch=key.epoch) for key in keys]
    return pb.DraftRequest(detach=pb.DetachSequences(sequences=sequences))


def draft_reply(
    call_id: int, result: Sequence[m.Attached] | m.ProposeResult | DSparkError | None, load: m.WorkerLoad
) -> pb.DraftReply:
    """The answer to a call: what was attached, proposals, None for a detach, or why the whole call was refused."""
    reply = pb.DraftReply(call_id=call_id, load=encode(load))
    if result is None:
        reply.detached.SetInParent()
    elif isinstance(result, DSparkError):
        reply.error.CopyFrom(encode(result))
    elif isinstance(result, m.ProposeResult):
        reply.proposed.CopyFrom(encode(result))
    else:
        reply.attached.CopyFrom(pb.AttachedSequences(sequences=[encode(attached) for attached in result]))
    return reply


@encode.register
def _(message: m.AttachSequence) -> pb.AttachSequence:
    return pb.AttachSequence(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        verifier_address=message.verifier_address,
        sampling=encode(message.sampling),
        request_id=message.request_id,
        max_len=message.max_len,
    )


@decode.register
def _(message: pb.AttachSequence) -> m.AttachSequence:
    return m.AttachSequence(
        key=key_of(message),
        verifier_address=message.verifier_address,
        sampling=decode(message.sampling),
        max_len=message.max_len,
        request_id=message.request_id,
    )


@decode.register
def _(message: pb.AttachSequences) -> tuple[m.AttachSequence, ...]:
    return tuple(decode(sequence) for sequence in message.sequences)


@encode.register
def _(message: m.Attached) -> pb.Attached:
    return pb.Attached(sequence_id=message.key.sequence_id, epoch=message.key.epoch, error=encode_error(message.error))


@decode.register
def _(message: pb.Attached) -> m.Attached:
    return m.Attached(key_of(message), decode_error(message))


@decode.register
def _(message: pb.AttachedSequences) -> tuple[m.Attached, ...]:
    return tuple(decode(attached) for attached in message.sequences)


@encode.register
def _(message: m.ProposeItem) -> pb.ProposeItem:
    return pb.ProposeItem(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        committed_len=message.committed_len,
        anchor=message.anchor,
        max_tokens=message.max_tokens,
        stay=message.stay,
        later=message.later,
    )


@decode.register
def _(message: pb.ProposeItem) -> m.ProposeItem:
    return m.ProposeItem(
        key_of(message), message.committed_len, message.anchor, message.max_tokens, message.stay, message.later
    )


@decode.register
def _(message: pb.ProposeBatch) -> tuple[m.ProposeItem, ...]:
    return tuple(decode(item) for item in message.items)


@encode.register
def _(message: m.Proposal) -> pb.Proposal:
    return pb.Proposal(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        committed_len=message.committed_len,
        tokens=message.tokens,
        confidences=message.confidences,
        distributions=[encode(distribution) for distribution in message.distributions],
        error=encode_error(message.error),
        stays=message.stays,
        alternatives=message.alternatives,
    )


@decode.register
def _(message: pb.Proposal) -> m.Proposal:
    if message.confidences and len(message.confidences) != len(message.tokens):
        raise InvalidRequest(f"a proposal has {len(message.tokens)} tokens but {len(message.confidences)} confidences")
    if message.alternatives and len(message.alternatives) != len(message.tokens):
        raise InvalidRequest(
            f"a proposal has {len(message.tokens)} tokens but {len(message.alternatives)} alternatives"
        )
    return m.Proposal(
        key=key_of(message),
        committed_len=message.committed_len,
        tokens=tuple(message.tokens),
        confidences=tuple(message.confidences),
        distributions=tuple(decode(distribution) for distribution in message.distributions),
        error=decode_error(message),
        stays=message.stays,
        alternatives=tuple(message.alternatives),
    )


@encode.register
def _(message: m.ProposeResult) -> pb.ProposeResult:
    return pb.ProposeResult(
        proposals=[encode(proposal) for proposal in message.proposals],
        forward_seconds=message.forward_seconds,
        total_seconds=message.total_seconds,
        feature_wait_seconds=message.feature_wait_seconds,
        queue_seconds=message.queue_seconds,
        fixed_seconds=message.fixed_seconds,
        marginal_seconds=message.marginal_seconds,
        other_requests=message.other_requests,
    )


@decode.register
def _(message: pb.ProposeResult) -> m.ProposeResult:
    return m.ProposeResult(
        proposals=tuple(decode(proposal) for proposal in message.proposals),
        forward_seconds=message.forward_seconds,
        total_seconds=message.total_seconds,
        feature_wait_seconds=message.feature_wait_seconds,
        queue_seconds=message.queue_seconds,
        fixed_seconds=message.fixed_seconds,
        marginal_seconds=message.marginal_seconds,
        other_requests=message.other_requests,
    )


@decode.register
def _(message: pb.DetachSequences) -> tuple[m.SequenceKey, ...]:
    return tuple(key_of(sequence) for sequence in message.sequences)
