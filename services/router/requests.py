"""A generation request as the router works on it: checked, tokenised, every default filled in."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.messages import ModelInfo, Sampling
from dspark.tokenizer import Tokenizer
from services.router.scheduling.policies import Policy

__all__ = ["Request", "ServedModel"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A target some verify worker has shown, and its tokenizer."""

    info: ModelInfo
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Request:
    """What one client wants.

    `stop_token_ids` holds the end-of-sequence ids too, unless the client ignores those. `max_verify_length` caps the
    draft tokens verified a round; None: as many as the router allows. `policy`: None: the router's own. `whole`: the
    client is content to hear of its tokens at the end.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    speculation: bool = True
    max_verify_length: int | None = None
    policy: Policy | None = None
    whole: bool = False

    @property
    def max_len(self) -> int:
        """Prompt and generated tokens at most."""
        return len(self.prompt) + self.max_tokens
