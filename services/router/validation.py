"""Checks a request's fields against their limits and fills in defaults. Every refusal names the field and the limit."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Iterable

from dspark.errors import ConfigError, InvalidRequest
from dspark.messages import Mode, Sampling
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import types_pb2
from services.router.requests import Request, ServedModel
from services.router.scheduling.policies import FORMS, NoDrafts, Policy, parse

__all__ = ["DEFAULT_MAX_TOKENS", "check", "request_id_of", "sampling_of", "tokenize"]

DEFAULT_MAX_TOKENS = 256
MAX_LOGPROBS = 20
MAX_REQUEST_ID = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_IDS = 256

_MODES: dict[int, Mode] = {
    types_pb2.SAMPLING_MODE_UNSPECIFIED: Mode.COUPLED,
    types_pb2.SAMPLING_MODE_COUPLED: Mode.COUPLED,
    types_pb2.SAMPLING_MODE_REJECTION: Mode.REJECTION,
}
_SPECULATION: dict[int, bool] = {
    pb.SPECULATION_UNSPECIFIED: True,
    pb.SPECULATION_ON: True,
    pb.SPECULATION_OFF: False,
}


def check(
    proto: pb.GenerateRequest, prompt: tuple[int, ...], request_id: str, model: ServedModel, room: int
) -> Request:
    """The request, complete.

    Args:
        proto: as it came.
        prompt: its token ids, see `tokenize`.
        request_id: see `request_id_of`.
        model: what it asks for.
        room: tokens of the longest sequence that can be served, prompt included.

    Raises:
        InvalidRequest: a field is out of its limits.
    """
    _check_prompt(prompt, model.info.vocab_size, room)
    stop_ids = _stop_ids(proto.stop_token_ids, model.info.vocab_size)
    policy = _policy(proto)
    ends = frozenset() if proto.ignore_eos else frozenset((*model.info.eos_token_ids, *model.tokenizer.eos_token_ids))
    return Request(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling_of(proto.sampling),
        max_tokens=_max_tokens(proto, len(prompt), room),
        stop=_stop_strings(proto.stop),
        stop_token_ids=stop_ids | ends,
        speculation=_speculation(proto.speculation) and policy != NoDrafts(),
        max_verify_length=proto.max_verify_length if proto.HasField("max_verify_length") else None,
        policy=policy,
        whole=proto.whole,
    )


def request_id_of(proto: pb.GenerateRequest, metadata: str) -> str:
    """The client's id from the message or the call's metadata, or a new one."""
    chosen = proto.request_id or metadata or uuid.uuid4().hex
    if len(chosen) > MAX_REQUEST_ID or not (chosen.isascii() and chosen.isprintable()):
        raise InvalidRequest(
            f"request_id: {len(chosen)} characters; at most {MAX_REQUEST_ID} printable ASCII ones are allowed"
        )
    return chosen


async def tokenize(proto: pb.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    """The prompt's token ids, from whichever form it came in. `InvalidRequest` where it is empty."""
    kind = proto.WhichOneof("prompt")
    if kind == "token_ids":
        return tuple(proto.token_ids.ids)
    if kind == "text":
        if not proto.text:
            raise InvalidRequest("prompt.text is empty; at least one character is needed")
        return await model.tokenizer.encode_async(proto.text)
    if kind == "chat":
        if not proto.chat.messages:
            raise InvalidRequest("prompt.chat.messages is empty; at least one message is needed")
        messages = [{"role": message.role, "content": message.content} for message in proto.chat.messages]
        return await model.tokenizer.encode_async(model.tokenizer.render_chat(messages), special_tokens=False)
    raise InvalidRequest("prompt is missing; set one of text, token_ids, chat")


def sampling_of(proto: pb.SamplingParams) -> Sampling:
    """Sampling settings with defaults filled in; an unset seed is drawn."""
    temperature = proto.temperature if proto.HasField("temperature") else 1.0
    top_p = proto.top_p if proto.HasField("top_p") else 1.0
    logprobs = proto.logprobs if proto.HasField("logprobs") else None
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise InvalidRequest(f"sampling.temperature is {temperature}; it must be a finite number of at least 0")
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest(f"sampling.top_p is {top_p}; it must be in (0, 1]")
    if not 0.0 <= proto.min_p < 1.0:
        raise InvalidRequest(f"sampling.min_p is {proto.min_p}; it must be in [0, 1)")
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise InvalidRequest(f"sampling.logprobs is {logprobs}; the limit is {MAX_LOGPROBS}")
    if proto.mode not in _MODES:
        raise InvalidRequest(f"sampling.mode is {proto.mode}; it must be 0 (default), 1 (coupled) or 2 (rejection)")
    return Sampling(
        temperature=temperature,
        top_k=proto.top_k,
        top_p=top_p,
        min_p=proto.min_p,
        seed=proto.seed if proto.HasField("seed") else secrets.randbits(64),
        mode=_MODES[proto.mode],
        logprobs=logprobs,
    )


def _check_prompt(prompt: tuple[int, ...], vocab_size: int, room: int) -> None:
    if not prompt:
        raise InvalidRequest("prompt.token_ids is empty; at least one token is needed")
    if len(prompt) >= room:
        raise InvalidRequest(
            f"prompt: {len(prompt)} tokens; the limit is {room - 1}, since prompt and answer share {room}"
        )
    _check_ids("prompt.token_ids", prompt, vocab_size)


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{field}[{index}] is {token_id}; the vocabulary has ids 0 to {vocab_size - 1}")


def _max_tokens(proto: pb.GenerateRequest, prompt_tokens: int, room: int) -> int:
    left = room - prompt_tokens
    if not proto.HasField("max_tokens"):
        return min(DEFAULT_MAX_TOKENS, left)
    if not 1 <= proto.max_tokens <= left:
        raise InvalidRequest(
            f"max_tokens is {proto.max_tokens}; it must be 1 to {left}, since {prompt_tokens} prompt tokens and the "
            f"answer share {room}"
        )
    return int(proto.max_tokens)


def _stop_strings(stop: Iterable[str]) -> tuple[str, ...]:
    strings = tuple(dict.fromkeys(stop))
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop: {len(strings)} strings; the limit is {MAX_STOP_STRINGS}")
    for index, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(f"stop[{index}]: {len(string)} characters; it must have 1 to {MAX_STOP_CHARACTERS}")
    return strings


def _stop_ids(ids: Iterable[int], vocab_size: int) -> frozenset[int]:
    stop = tuple(ids)
    if len(stop) > MAX_STOP_IDS:
        raise InvalidRequest(f"stop_token_ids: {len(stop)} ids; the limit is {MAX_STOP_IDS}")
    _check_ids("stop_token_ids", stop, vocab_size)
    return frozenset(stop)


def _policy(proto: pb.GenerateRequest) -> Policy | None:
    """The policy named; None: the router's own."""
    if not proto.policy:
        return None
    try:
        return parse(proto.policy)
    except ConfigError as error:
        raise InvalidRequest(
            f"policy is {proto.policy!r}; it must be {FORMS}, or empty for the router's own"
        ) from error


def _speculation(value: int) -> bool:
    if value not in _SPECULATION:
        raise InvalidRequest(f"speculation is {value}; it must be 0 (default), 1 (on) or 2 (off)")
    return _SPECULATION[value]
