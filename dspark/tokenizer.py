"""Text to token ids and back: encoding, chat templates, and decoding token by token without ever cutting a character.

Built from two files that a verify worker hands out, so that no reader of it needs the model: `tokenizer.json`, and
`model.json` with the keys `bos_token_id` (or null), `eos_token_ids` and `chat_template` (or null). Torch-free.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from dspark.errors import InvalidRequest, ModelFileError

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

INLINE_CHARACTERS = 2048  # about 0.5 ms of encoding; longer texts are encoded off the event loop
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """A model's tokenizer: ids are those of the model's vocabulary.

    Args:
        tokenizer_json: the file of that name, in the format of the `tokenizers` library.
        model_json: the facts named in this module's docstring, as JSON; other keys are ignored.

    Raises:
        ModelFileError: either is broken.
    """

    def __init__(self, tokenizer_json: bytes, model_json: bytes = b"{}") -> None:
        try:
            self._inner = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises plain Exception
            raise ModelFileError(f"tokenizer.json: {error}") from error
        # A file may carry a training set-up's limits; a cut prompt would be answered as if it were the whole one.
        self._inner.no_truncation()
        self._inner.no_padding()
        self._textless = {id_ for id_, token in self._inner.get_added_tokens_decoder().items() if token.special}
        facts = _facts(model_json)
        self.bos_token_id: int | None = facts.get("bos_token_id")
        self.eos_token_ids: tuple[int, ...] = tuple(facts.get("eos_token_ids") or ())
        self._chat_template: str | None = facts.get("chat_template")

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._chat_template is not None

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of a text; `special_tokens` adds what the tokenizer's own post-processor adds (BOS, as a rule)."""
        return tuple(self._inner.encode(text, add_special_tokens=special_tokens).ids)

    async def encode_async(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """`encode`, in a thread where the text is long."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, special_tokens=special_tokens)
        return await asyncio.to_thread(self._encode_long, text, special_tokens)

    def _encode_long(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        """As a batch of one, during which the library lets go of the interpreter; `encode` keeps it to itself."""
        return tuple(self._inner.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none."""
        return self._inner.decode(list(token_ids), skip_special_tokens=True)

    def pieces(self, token_ids: Iterable[int]) -> tuple[str, ...]:
        """The vocabulary's own spelling of each id, empty for an id that has none."""
        return tuple(self._inner.id_to_token(token_id) or "" for token_id in token_ids)

    def settles(self, token_id: int) -> bool:
        """Whether the text up to this token may be final: not so after a single byte (`<0xE2>`) or a textless token."""
        piece = self._inner.id_to_token(token_id)
        return piece is not None and token_id not in self._textless and _BYTE_PIECE.fullmatch(piece) is None

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation (`role`, `content`), up to where the assistant's answer starts.

        The text holds the special tokens that the template writes; encode it with `special_tokens=False`.
        `InvalidRequest` where the model has no template, or its template refuses the conversation.
        """
        if self._chat_template is None:
            raise InvalidRequest("prompt.chat: the model has no chat template; send prompt.text instead")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._special(self.bos_token_id),
                eos_token=self._special(self.eos_token_ids[0] if self.eos_token_ids else None),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"prompt.chat: the model's chat template refuses it: {error}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _to_json  # jinja's own escapes for HTML
        return environment.from_string(self._chat_template or "")

    def _special(self, token_id: int | None) -> str:
        return "" if token_id is None else self._inner.id_to_token(token_id) or ""


def _facts(model_json: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(model_json)
    except ValueError as error:
        raise ModelFileError(f"model.json: {error}") from error
    if not isinstance(facts, dict):
        raise ModelFileError("model.json: not a JSON object")
    return facts


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_: str) -> str:
    return datetime.now().astimezone().strftime(format_)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class IncrementalDetokenizer:
    """Decodes a growing list of ids. What `push` and `flush` return joins to exactly `decode` of all ids.

    A decoder looks at its neighbours: byte tokens make a character together (and if one of a run is wrong, all of the
    run are), and a first token may lose its leading space. So a window of two stretches of tokens is decoded, the
    earlier one already returned, and the later one's text is what the window has more. Text is held back while the
    window ends in a byte token or an unfinished character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # of the window
        self._settled = 0  # ids before it are in the text returned so far
        self._settled_text = ""  # of the window's part before it
        self._returned = 0  # characters

    def hold(self, token_id: int) -> None:
        """Its text may come later."""
        self._ids.append(token_id)

    def push(self, token_id: int) -> str:
        """The text that is certain now, often with earlier tokens' share, often empty."""
        self._ids.append(token_id)
        if not self._tokenizer.settles(token_id):
            return ""
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT) or len(text) <= len(self._settled_text):
            return ""
        new = text[len(self._settled_text) :]
        self._start, self._settled = self._settled, len(self._ids)
        self._settled_text = self._tokenizer.decode(self._ids[self._start :])
        self._returned += len(new)
        return new

    def flush(self) -> str:
        """The rest, at the end; unfinished characters come as U+FFFD."""
        rest = self._tokenizer.decode(self._ids)[self._returned :]
        self._returned += len(rest)
        return rest
