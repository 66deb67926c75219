"""What a client may ask for, and the request it becomes. Limits are the router's to check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, cast

from dspark.errors import InvalidRequest
from dspark.messages import Mode
from dspark.v1 import generation_pb2 as pb
from dspark.v1 import types_pb2

__all__ = ["GenerateParams", "Prompt", "check_header", "request_of"]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids (used as they are), or chat messages `{"role": …, "content": …}` for the model's template."""

_MODES = {Mode.COUPLED: types_pb2.SAMPLING_MODE_COUPLED, Mode.REJECTION: types_pb2.SAMPLING_MODE_REJECTION}
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs")
_REQUEST_FIELDS = ("request_id", "model", "max_tokens", "ignore_eos", "max_verify_length", "policy", "whole")


class GenerateParams(TypedDict, total=False):
    """What may be said about a completion; what is left out (or None) takes the router's default.

    temperature: 0 is greedy, 1 the model's own distribution (default).
    top_k, top_p, min_p: cut the distribution's tail, in this order; off by default.
    seed: the same seed gives the same text in coupled mode; drawn by the router otherwise.
    mode: "coupled" (reproducible, default) or "rejection" (highest acceptance).
    logprobs: report this many alternatives beside each token.
    max_tokens: 256 by default, or what the context leaves.
    stop: strings that end the text and are cut from it.
    stop_token_ids: tokens that end it. ignore_eos: the end-of-sequence token does not.
    speculation: False decodes without the drafter.
    max_verify_length: verify at most so many draft tokens a round.
    policy: how many of them are verified: "none", "fixed:N", …; the router's own choice by default.
    whole: tokens may come together at the end, which costs less than a message a round; `complete` asks for it.
    model: refused if another is served. request_id: for logs and `abort`. timeout: seconds until it is given up.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    mode: Mode | str | None
    logprobs: int | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    speculation: bool
    max_verify_length: int | None
    policy: str | None
    whole: bool | None
    model: str | None
    request_id: str | None
    timeout: float | None


def request_of(prompt: Prompt, params: GenerateParams) -> pb.GenerateRequest:
    """The message for a prompt and its parameters. `InvalidRequest` names a field that cannot be sent."""
    _check_names(params)
    request = pb.GenerateRequest()
    _set_prompt(request, prompt)
    values = cast("Mapping[str, Any]", params)
    for name in _SAMPLING_FIELDS:
        _set(request.sampling, name, values.get(name))
    for name in _REQUEST_FIELDS:
        _set(request, name, values.get(name))
    if (mode := params.get("mode")) is not None:
        request.sampling.mode = _MODES[_mode(mode)]
    if params.get("speculation") is False:
        request.speculation = pb.SPECULATION_OFF
    stop = params.get("stop")
    _extend(request.stop, "stop", [stop] if isinstance(stop, str) else stop or ())
    _extend(request.stop_token_ids, "stop_token_ids", params.get("stop_token_ids") or ())
    return request


def _check_names(params: GenerateParams) -> None:
    if unknown := sorted(set(params) - set(GenerateParams.__annotations__)):
        raise InvalidRequest(f"unknown parameter {unknown[0]!r}; known are {', '.join(GenerateParams.__annotations__)}")
    check_header("request_id", params.get("request_id") or "")


def check_header(name: str, value: str) -> None:
    """`InvalidRequest` for what cannot travel as metadata, on which gRPC would hang or fail obscurely."""
    if not (value.isascii() and value.isprintable()):
        raise InvalidRequest(f"{name} is {value!r}; only printable ASCII characters can be sent")


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, bytes):
        raise InvalidRequest("the prompt is bytes; text, token ids or chat messages are needed")
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        for message in cast("Sequence[Mapping[str, str]]", prompt):
            if set(message) != {"role", "content"}:
                raise InvalidRequest(f"a chat message has role and content, not {sorted(message)}")
            _extend(request.chat.messages, "messages", [pb.ChatMessage(**message)])
    else:
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, "token_ids", cast("Sequence[int]", prompt))


def _mode(mode: Mode | str) -> Mode:
    try:
        return Mode(mode)
    except ValueError as error:
        raise InvalidRequest(f"mode {mode!r} is none of {', '.join(repr(m.value) for m in Mode)}") from error


def _set(message: Any, name: str, value: Any) -> None:
    if value is None:
        return
    try:
        setattr(message, name, value)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} is {value!r}: {error}") from error


def _extend(field: Any, name: str, values: Sequence[Any]) -> None:
    try:
        field.extend(values)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name}: {error}") from error
