"""The two dispatching functions, and what every message shares: keys and errors."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import grpc

from dspark.errors import DSparkError, InternalError, from_status, status_code
from dspark.messages import SequenceKey
from dspark.v1 import types_pb2

_STATUS_BY_NUMBER = {status.value[0]: status for status in grpc.StatusCode}


@singledispatch
def encode(message: Any) -> Any:
    """The protobuf message of the same name; of a `DSparkError`, its `ItemError`."""
    raise InternalError(f"no protobuf message for {type(message).__name__}")


@singledispatch
def decode(message: Any) -> Any:
    """The dataclass of the same name (a batch message: a tuple of them). `InvalidRequest` where fields contradict."""
    raise InternalError(f"no dataclass for {type(message).__name__}")


@encode.register
def _(message: DSparkError) -> types_pb2.ItemError:
    return types_pb2.ItemError(code=status_code(message).value[0], message=str(message))


@decode.register
def _(message: types_pb2.ItemError) -> DSparkError:
    status = _STATUS_BY_NUMBER.get(message.code, grpc.StatusCode.UNKNOWN)
    return from_status(status, message.message, worker=True)


def encode_error(error: DSparkError | None) -> types_pb2.ItemError | None:
    """What to put into an `error` field."""
    return None if error is None else encode(error)


def decode_error(message: Any) -> DSparkError | None:
    """The error of a message with an `error` field (`Verdict`, `VerifierReply`, …), None where it has none."""
    return decode(message.error) if message.HasField("error") else None


def key_of(message: Any) -> SequenceKey:
    """The key of any message that carries sequence_id and epoch."""
    return SequenceKey(message.sequence_id, message.epoch)
