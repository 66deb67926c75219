"""Messages between router and verify worker, and the features that a draft worker reads."""

from __future__ import annotations

from collections.abc import Sequence

from dspark import messages as m
from dspark.errors import DSparkError
from dspark.rpc.codec.base import decode, decode_error, encode, encode_error, key_of
from dspark.v1 import verifier_pb2 as pb


def open_call(sequences: Sequence[m.OpenSequence]) -> pb.VerifierRequest:
    """A session's request to open sequences; the session fills in the call_id."""
    return pb.VerifierRequest(open=pb.OpenSequences(sequences=[encode(sequence) for sequence in sequences]))


def step_call(items: Sequence[m.StepItem]) -> pb.VerifierRequest:
    """A session's request for one step."""
    return pb.VerifierRequest(step=pb.StepBatch(items=[encode(item) for item in items]))


def close_call(keys: Sequence[m.SequenceKey]) -> pb.VerifierRequest:
    """A session's request to close sequences."""
    sequences = [pb.CloseSequence(sequence_id=key.sequence_id, epoch=key.epoch) for key in keys]
    return pb.VerifierRequest(close=pb.CloseSequences(sequences=sequences))


def verifier_reply(
    call_id: int, result: Sequence[m.Opened] | m.StepResult | DSparkError | None, load: m.WorkerLoad
) -> pb.VerifierReply:
    """The answer to a call: what was opened, a step's result, None for a close, or why the whole call was refused."""
    reply = pb.VerifierReply(call_id=call_id, load=encode(load))
    if result is None:
        reply.closed.SetInParent()
    elif isinstance(result, DSparkError):
        reply.error.CopyFrom(encode(result))
    elif isinstance(result, m.StepResult):
        reply.step.CopyFrom(encode(result))
    else:
        reply.opened.CopyFrom(pb.OpenedSequences(sequences=[encode(opened) for opened in result]))
    return reply


@encode.register
def _(message: m.OpenSequence) -> pb.OpenSequence:
    return pb.OpenSequence(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        token_ids=message.token_ids,
        sampling=encode(message.sampling),
        max_len=message.max_len,
        features=message.features,
        request_id=message.request_id,
    )


@decode.register
def _(message: pb.OpenSequence) -> m.OpenSequence:
    return m.OpenSequence(
        key=key_of(message),
        token_ids=tuple(message.token_ids),
        sampling=decode(message.sampling),
        max_len=message.max_len,
        features=message.features,
        request_id=message.request_id,
    )


@decode.register
def _(message: pb.OpenSequences) -> tuple[m.OpenSequence, ...]:
    return tuple(decode(sequence) for sequence in message.sequences)


@encode.register
def _(message: m.Opened) -> pb.Opened:
    return pb.Opened(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        computed_len=message.computed_len,
        error=encode_error(message.error),
    )


@decode.register
def _(message: pb.Opened) -> m.Opened:
    return m.Opened(key_of(message), message.computed_len, decode_error(message))


@decode.register
def _(message: pb.OpenedSequences) -> tuple[m.Opened, ...]:
    return tuple(decode(opened) for opened in message.sequences)


@encode.register
def _(message: m.Alternative) -> pb.Alternative:
    return pb.Alternative(place=message.place, token=message.token)


@decode.register
def _(message: pb.Alternative) -> m.Alternative:
    return m.Alternative(message.place, message.token)


@encode.register
def _(message: m.StepItem) -> pb.StepItem:
    return pb.StepItem(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        committed_len=message.committed_len,
        count=message.count,
        draft_tokens=message.draft_tokens,
        draft_distributions=[encode(distribution) for distribution in message.draft_distributions],
        keep=message.keep,
        hold_features=message.hold_features,
        alternatives=[encode(alternative) for alternative in message.alternatives],
    )


@decode.register
def _(message: pb.StepItem) -> m.StepItem:
    return m.StepItem(
        key=key_of(message),
        committed_len=message.committed_len,
        count=message.count,
        draft_tokens=tuple(message.draft_tokens),
        draft_distributions=tuple(decode(distribution) for distribution in message.draft_distributions),
        keep=message.keep if message.HasField("keep") else None,
        hold_features=message.hold_features,
        alternatives=tuple(decode(alternative) for alternative in message.alternatives),
    )


@decode.register
def _(message: pb.StepBatch) -> tuple[m.StepItem, ...]:
    return tuple(decode(item) for item in message.items)


@encode.register
def _(message: m.Verdict) -> pb.Verdict:
    return pb.Verdict(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        committed_len=message.committed_len,
        computed_len=message.computed_len,
        accepted=message.accepted,
        token=message.token,
        logprobs=[encode(position) for position in message.logprobs],
        error=encode_error(message.error),
        matched=message.matched,
        turned=message.turned,
        alternatives=message.alternatives,
    )


@decode.register
def _(message: pb.Verdict) -> m.Verdict:
    return m.Verdict(
        key=key_of(message),
        committed_len=message.committed_len,
        computed_len=message.computed_len,
        accepted=message.accepted,
        token=message.token if message.HasField("token") else None,
        logprobs=tuple(decode(position) for position in message.logprobs),
        error=decode_error(message),
        matched=message.matched,
        turned=message.turned,
        alternatives=message.alternatives,
    )


@encode.register
def _(message: m.StepResult) -> pb.StepResult:
    return pb.StepResult(
        verdicts=[encode(verdict) for verdict in message.verdicts],
        forward_seconds=message.forward_seconds,
        sample_seconds=message.sample_seconds,
        total_seconds=message.total_seconds,
        queue_seconds=message.queue_seconds,
        fixed_seconds=message.fixed_seconds,
        marginal_seconds=message.marginal_seconds,
        other_tokens=message.other_tokens,
        other_prompt_tokens=message.other_prompt_tokens,
        other_sequences=message.other_sequences,
        other_gained=message.other_gained,
    )


@decode.register
def _(message: pb.StepResult) -> m.StepResult:
    return m.StepResult(
        verdicts=tuple(decode(verdict) for verdict in message.verdicts),
        forward_seconds=message.forward_seconds,
        sample_seconds=message.sample_seconds,
        total_seconds=message.total_seconds,
        queue_seconds=message.queue_seconds,
        fixed_seconds=message.fixed_seconds,
        marginal_seconds=message.marginal_seconds,
        other_tokens=message.other_tokens,
        other_prompt_tokens=message.other_prompt_tokens,
        other_sequences=message.other_sequences,
        other_gained=message.other_gained,
    )


@decode.register
def _(message: pb.CloseSequences) -> tuple[m.SequenceKey, ...]:
    return tuple(key_of(sequence) for sequence in message.sequences)


@encode.register
def _(message: m.FeatureBlock) -> pb.FeatureBlock:
    return pb.FeatureBlock(
        sequence_id=message.key.sequence_id,
        epoch=message.key.epoch,
        start=message.start,
        count=message.count,
        data=message.data,
        error=encode_error(message.error),
        token_ids=message.token_ids,
    )


@decode.register
def _(message: pb.FeatureBlock) -> m.FeatureBlock:
    return m.FeatureBlock(
        key=key_of(message),
        start=message.start,
        count=message.count,
        data=message.data,
        error=decode_error(message),
        token_ids=tuple(message.token_ids),
    )
