"""Translates `dspark.messages` to and from protobuf. The only module beside each `service.py` that knows both.

`encode` and `decode` dispatch on the type of their argument. A batch message decodes to the tuple of its items
(`StepBatch` to `tuple[StepItem, ...]`); the functions ending in `_call` and `_reply` build the batched messages of a
session. Numbers pass unchanged, infinities and NaN included: what they may be is for the receiving engine to judge.
"""

from __future__ import annotations

from dspark.rpc.codec import common as _common  # registers its messages
from dspark.rpc.codec.base import decode, decode_error, encode, encode_error, key_of
from dspark.rpc.codec.draft import attach_call, detach_call, draft_reply, propose_call
from dspark.rpc.codec.verifier import close_call, open_call, step_call, verifier_reply

__all__ = [
    "attach_call",
    "close_call",
    "decode",
    "decode_error",
    "detach_call",
    "draft_reply",
    "encode",
    "encode_error",
    "key_of",
    "open_call",
    "propose_call",
    "step_call",
    "verifier_reply",
]

del _common
