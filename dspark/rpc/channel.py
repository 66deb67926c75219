"""Connections to services, all with the same limits and keepalive, and the errors that come back over them."""

from __future__ import annotations

import re

import grpc

from dspark.errors import DSparkError, InvalidRequest, Overloaded, from_status
from dspark.rpc.options import MAX_MESSAGE_BYTES, RETRY_AFTER, channel_options

__all__ = ["connect", "error_from_call"]

_TOO_LARGE = re.compile(r"(?:Sent|Received) message larger than max \((\d+) vs\. (\d+)\)", re.IGNORECASE)


def connect(address: str, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> grpc.aio.Channel:
    """A channel to `host:port`, for `async with`. Connects lazily; nothing is retried behind the caller."""
    return grpc.aio.insecure_channel(address, options=channel_options(max_message_bytes))


def error_from_call(error: grpc.aio.AioRpcError, *, worker: bool = False) -> DSparkError:
    """The error behind a failed call: an `Overloaded` with its retry hint, too large a message as `InvalidRequest`."""
    details = error.details() or error.code().name
    if (sizes := _TOO_LARGE.search(details)) is not None:
        return InvalidRequest(f"the message has {sizes[1]} bytes, the limit is {sizes[2]} bytes")
    found = from_status(error.code(), details, worker=worker)
    if isinstance(found, Overloaded):
        for key, value in error.trailing_metadata() or ():
            if key == RETRY_AFTER:
                found.retry_after = float(value) / 1000
    return found
