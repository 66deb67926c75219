"""When a request ends, and which text its tokens come to. Knows ids, strings and the tokenizer, no services."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from dspark.tokenizer import IncrementalDetokenizer, Tokenizer
from services.router.requests import Request

__all__ = ["PORTION", "FinishReason", "StopText", "cut"]

PORTION = 512
"""Tokens of a whole answer that go out together, with their text: no message of one grows with its length."""


class FinishReason(enum.Enum):
    """Why a request is complete."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens


def cut(tokens: Sequence[int], left: int, request: Request) -> tuple[int, FinishReason | None]:
    """How many of a round's new tokens count, and whether the last of them ends the request.

    Args:
        tokens: accepted drafts and the token after them.
        left: tokens the request may still emit, at least 1.
        request: names the ids that stop it.
    """
    for index, token in enumerate(tokens[:left], start=1):
        if token in request.stop_token_ids:
            return index, FinishReason.STOP
        if index == left:
            return index, FinishReason.LENGTH
    return len(tokens), None


class StopText:
    """Turns a request's tokens into text that is whole UTF-8 and never reaches into a stop string.

    Where nobody waits for it (`whole`) and nothing is looked for in it, it comes by portions, the last with `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, whole: bool = False) -> None:
        self.late = whole and not stop
        """Whether text is behind the tokens by more than a few."""
        self._tokens = 0
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._stop = tuple(stop)
        self._held = ""  # could yet turn out to begin a stop string
        self.matched: str | None = None

    def push(self, token_id: int) -> str:
        """The text that this token makes certain. Once `matched` is set, the text ends."""
        self._tokens += 1
        if self.late and self._tokens % PORTION:
            self._detokenizer.hold(token_id)
            return ""
        return self._release(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """What was held back, when no more tokens come; a stop string completed here still cuts."""
        if self.matched is not None:
            return ""
        text = self._release(self._detokenizer.flush())
        held, self._held = self._held, ""
        return text if self.matched is not None else text + held

    def _release(self, new: str) -> str:
        if not new or not self._stop:
            return new
        text = self._held + new
        found = [(at, -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:  # the first in the text, of several there the longest
            at, _, self.matched = min(found)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if n == 0 or text.endswith(stop[:n]))
