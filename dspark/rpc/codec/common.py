"""Messages of types.proto, and the descriptions of drafters and taps."""

from __future__ import annotations

from dspark import messages as m
from dspark.errors import InvalidRequest
from dspark.rpc.codec.base import decode, encode
from dspark.v1 import draft_pb2, types_pb2, verifier_pb2

_MODE_TO_PROTO = {
    m.Mode.COUPLED: types_pb2.SAMPLING_MODE_COUPLED,
    m.Mode.REJECTION: types_pb2.SAMPLING_MODE_REJECTION,
}
_MODE_FROM_PROTO = {
    types_pb2.SAMPLING_MODE_UNSPECIFIED: m.Mode.COUPLED,
    types_pb2.SAMPLING_MODE_COUPLED: m.Mode.COUPLED,
    types_pb2.SAMPLING_MODE_REJECTION: m.Mode.REJECTION,
}


@encode.register
def _(message: m.Sampling) -> types_pb2.Sampling:
    return types_pb2.Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        mode=_MODE_TO_PROTO[message.mode],
        logprobs=message.logprobs,
    )


@decode.register
def _(message: types_pb2.Sampling) -> m.Sampling:
    mode = _MODE_FROM_PROTO.get(message.mode)
    if mode is None:
        raise InvalidRequest(f"sampling.mode {message.mode} is none of 0 (default), 1 (coupled), 2 (rejection)")
    return m.Sampling(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        seed=message.seed,
        mode=mode,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


@encode.register
def _(message: m.TokenLogprob) -> types_pb2.TokenLogprob:
    return types_pb2.TokenLogprob(token_id=message.token_id, logprob=message.logprob)


@decode.register
def _(message: types_pb2.TokenLogprob) -> m.TokenLogprob:
    return m.TokenLogprob(message.token_id, message.logprob)


@encode.register
def _(message: m.PositionLogprobs) -> types_pb2.PositionLogprobs:
    return types_pb2.PositionLogprobs(chosen=encode(message.chosen), top=[encode(entry) for entry in message.top])


@decode.register
def _(message: types_pb2.PositionLogprobs) -> m.PositionLogprobs:
    return m.PositionLogprobs(decode(message.chosen), tuple(decode(entry) for entry in message.top))


@encode.register
def _(message: m.SparseDistribution) -> types_pb2.SparseDistribution:
    return types_pb2.SparseDistribution(token_ids=message.token_ids, probabilities=message.probabilities)


@decode.register
def _(message: types_pb2.SparseDistribution) -> m.SparseDistribution:
    ids, probabilities = tuple(message.token_ids), tuple(message.probabilities)
    if len(ids) != len(probabilities):
        raise InvalidRequest(f"a distribution has {len(ids)} token_ids but {len(probabilities)} probabilities")
    return m.SparseDistribution(ids, probabilities)


@encode.register
def _(message: m.WorkerLoad) -> types_pb2.WorkerLoad:
    return types_pb2.WorkerLoad(
        running=message.running,
        waiting=message.waiting,
        tokens_in_flight=message.tokens_in_flight,
        free_pages=message.free_pages,
        total_pages=message.total_pages,
        step_seconds=message.step_seconds,
        draining=message.draining,
        observed_ratio=message.observed_ratio,
    )


@decode.register
def _(message: types_pb2.WorkerLoad) -> m.WorkerLoad:
    return m.WorkerLoad(
        running=message.running,
        waiting=message.waiting,
        tokens_in_flight=message.tokens_in_flight,
        free_pages=message.free_pages,
        total_pages=message.total_pages,
        step_seconds=message.step_seconds,
        draining=message.draining,
        observed_ratio=message.observed_ratio,
    )


@encode.register
def _(message: m.ModelInfo) -> types_pb2.ModelInfo:
    return types_pb2.ModelInfo(
        name=message.name,
        architecture=message.architecture,
        model_fingerprint=message.model_fingerprint,
        numerics_fingerprint=message.numerics_fingerprint,
        vocab_size=message.vocab_size,
        hidden_size=message.hidden_size,
        num_layers=message.num_layers,
        max_context=message.max_context,
        eos_token_ids=message.eos_token_ids,
        bos_token_id=message.bos_token_id,
        has_chat_template=message.has_chat_template,
    )


@decode.register
def _(message: types_pb2.ModelInfo) -> m.ModelInfo:
    return m.ModelInfo(
        name=message.name,
        architecture=message.architecture,
        model_fingerprint=message.model_fingerprint,
        numerics_fingerprint=message.numerics_fingerprint,
        vocab_size=message.vocab_size,
        hidden_size=message.hidden_size,
        num_layers=message.num_layers,
        max_context=message.max_context,
        eos_token_ids=tuple(message.eos_token_ids),
        bos_token_id=message.bos_token_id if message.HasField("bos_token_id") else None,
        has_chat_template=message.has_chat_template,
    )


@encode.register
def _(message: m.DrafterInfo) -> draft_pb2.DrafterInfo:
    return draft_pb2.DrafterInfo(
        name=message.name,
        architecture=message.architecture,
        fingerprint=message.fingerprint,
        tap_id=message.tap_id,
        model_fingerprint=message.model_fingerprint,
        vocab_size=message.vocab_size,
        draft_vocab_size=message.draft_vocab_size,
        block_size=message.block_size,
    )


@decode.register
def _(message: draft_pb2.DrafterInfo) -> m.DrafterInfo:
    return m.DrafterInfo(
        name=message.name,
        architecture=message.architecture,
        fingerprint=message.fingerprint,
        tap_id=message.tap_id,
        model_fingerprint=message.model_fingerprint,
        vocab_size=message.vocab_size,
        draft_vocab_size=message.draft_vocab_size,
        block_size=message.block_size,
    )


@encode.register
def _(message: m.TapInfo) -> verifier_pb2.TapInfo:
    return verifier_pb2.TapInfo(
        tap_id=message.tap_id,
        layer_ids=message.layer_ids,
        target_hidden_size=message.target_hidden_size,
        feature_size=message.feature_size,
        norm_eps=message.norm_eps,
        target_vocab_size=message.target_vocab_size,
        model_fingerprint=message.model_fingerprint,
        normalize_inputs=message.normalize_inputs,
    )


@decode.register
def _(message: verifier_pb2.TapInfo) -> m.TapInfo:
    return m.TapInfo(
        tap_id=message.tap_id,
        layer_ids=tuple(message.layer_ids),
        target_hidden_size=message.target_hidden_size,
        feature_size=message.feature_size,
        norm_eps=message.norm_eps,
        target_vocab_size=message.target_vocab_size,
        model_fingerprint=message.model_fingerprint,
        normalize_inputs=message.normalize_inputs,
    )
