"""Texts to try drafters on: the target's answers to prompts, and what is read of the target along them.

Answers are those that a cluster gives in coupled mode to the same prompt, temperature and seed. Along an answer the
target is run once more, with the verify worker's kernels and taps, so that a drafter meets the same features, bit for
bit, as when it is served. All of it is kept in memory: d values a token and drafter. Leaves drafting to
`training.rounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.errors import ConfigError
from dspark.models.batch import RaggedBatch
from dspark.models.drafters import Drafter
from dspark.models.kv_cache import KVCache
from dspark.models.target import Forward, TargetModel
from services.verifier.step import split
from services.verifier.taps import Tap, check_info
from training.prompts import Prompt
from training.responses import Responder

__all__ = ["Observed", "Text", "answer", "loops", "numbered_prompts", "observe"]

_PAGE_SIZE = 16
_LAW_ROWS = 64  # rows of logits at a time
_STEP_ROWS = {"cpu": 512, "cuda": 8192}  # of one forward: a card is idle with the rows of one text
_TAIL, _PERIOD = 48, 24


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its answer in one list of ids, and how the answer was drawn.

    The answer ends with an end-of-sequence token, or is as long as `max_len`, prompt included, allows.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    max_len: int
    temperature: float
    seed: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def room(self, committed: int) -> int:
        """Draft tokens worth a round at committed length N that can be compared with the answer.

        The round emits one token more than it accepts, so that a router asks for one less than the request may still
        emit; nothing is known of what the target would say behind the end-of-sequence token.
        """
        return min(self.max_len - committed - 1, len(self) - committed)


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What the target's forward shows along a text of L tokens, the first P of them its prompt.

    `features[tap_id]`: bfloat16 (L - 1, d), one row for each of positions 0 … L - 2. `hidden`: (L - P, d) after the
    final norm, in the target's dtype; row i decides the token at position P + i. `log_z`: float64 (L - P,), the
    log of the sum of exp(logit / temperature) of those rows; None where not asked for, and at temperature 0. `head`:
    the target's (vocab, d), shared by all.
    """

    text: Text
    hidden: Tensor
    head: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    log_z: Tensor | None = None


def numbered_prompts(prompts: Sequence[Sequence[int]], temperature: float, seed: int) -> list[Prompt]:
    """Prompts as `dspark evaluate` samples them: the i-th with seed + i."""
    return [Prompt(tuple(ids), temperature, (seed + number) % 2**64) for number, ids in enumerate(prompts)]


def answer(
    target: TargetModel,
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    batch: int = 64,
    stepped: Callable[[int], None] = lambda _: None,
) -> list[Text]:
    """The target's answers in the order of the prompts; `stepped` hears after every step how many tokens it gave."""
    if not prompts:
        raise ConfigError("there is no prompt to answer")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    responder = Responder(target, longest=longest, max_new=max_tokens, batch=min(batch, len(prompts)))
    texts: dict[int, Text] = {}
    for number, response in responder.answer(enumerate(prompts), stepped):
        prompt = prompts[number]
        limit = response.prompt_length + max_tokens
        texts[number] = Text(response.token_ids, response.prompt_length, limit, prompt.temperature, prompt.seed)
    return [texts[number] for number in range(len(prompts))]


def loops(text: Text) -> bool:
    """Whether the answer repeats itself: its last 48 tokens have some period of at most 24.

    An answer of fewer than 48 tokens does not count as one that loops.
    """
    tail = text.token_ids[text.prompt_length :][-_TAIL:]
    return len(tail) == _TAIL and any(tail[period:] == tail[:-period] for period in range(1, _PERIOD + 1))


@torch.inference_mode()
def observe(
    target: TargetModel,
    texts: Sequence[Text],
    drafters: Iterable[Drafter] = (),
    *,
    laws: bool = False,
    step_rows: int | None = None,
) -> list[Observed]:
    """Run the target along texts for the drafters given; `laws` also asks for `log_z`.

    `step_rows`: most rows of one forward, by default as many as suit the device.

    Raises:
        Mismatch: a drafter's tap does not fit this target.
        ConfigError: a text is longer than the model's context.
    """
    taps = [_tap(target, drafter) for drafter in drafters]
    rows = step_rows or _STEP_ROWS.get(target.device.type, _STEP_ROWS["cpu"])
    groups = list(split(texts, rows, lambda text: len(text) - 1))
    watch = _Watch(target, {tap.info.tap_id: tap for tap in taps}, groups, rows)
    return [one for group in groups for one in watch.along(group, laws=laws)]


def _tap(target: TargetModel, drafter: Drafter) -> Tap:
    check_info(drafter.tap, target.info)
    return Tap(drafter.tap, drafter.tap_tensors(), target.kernels, target.device)


class _Watch:
    """A target with room for one group of texts at a time: several in one forward, or one that takes several."""

    def __init__(
        self, target: TargetModel, taps: dict[str, Tap], groups: Sequence[Sequence[Text]], step_rows: int
    ) -> None:
        longest = max((len(text) for group in groups for text in group), default=1)
        if longest > target.config.max_context:
            raise ConfigError(f"a text of {longest} tokens is over the model's {target.config.max_context}")
        self._target, self._taps, self._step_rows = target, taps, step_rows
        self._layers = frozenset(layer for tap in taps.values() for layer in tap.info.layer_ids)
        self._cache = KVCache(
            target.config,
            pages=max((sum(len(text) // _PAGE_SIZE + 3 for text in group) for group in groups), default=1),
            page_size=_PAGE_SIZE,
            dtype=target.kept_dtype,
            device=target.device,
            max_step_rows=step_rows,
            prefix_cache=False,
        )

    def along(self, group: Sequence[Text], *, laws: bool) -> list[Observed]:
        pieces, lengths = list(self._pieces(group)), [len(text) - 1 for text in group]
        hidden = torch.split(torch.cat([piece.hidden for piece in pieces]), lengths)
        features = {tap_id: torch.split(self._features(tap, pieces), lengths) for tap_id, tap in self._taps.items()}
        return [
            self._observed(text, hidden[n], {tap_id: rows[n] for tap_id, rows in features.items()}, laws=laws)
            for n, text in enumerate(group)
        ]

    def _observed(self, text: Text, hidden: Tensor, features: dict[str, Tensor], *, laws: bool) -> Observed:
        answered = hidden[text.prompt_length - 1 :].clone()
        log_z = self._log_z(answered, text.temperature) if laws and text.temperature > 0 else None
        return Observed(text, answered, self._target.head_weight, features, log_z)

    def _pieces(self, group: Sequence[Text]) -> Iterator[Forward]:
        """Forwards over all tokens but each text's last, a bounded number of rows each."""
        ids = [text.token_ids[:-1] for text in group]
        sequences = [self._cache.open(own, len(own)) for own in ids]
        for start in range(0, max(map(len, ids)), self._step_rows):
            pieces = [own[start : start + self._step_rows] for own in ids]
            batch = RaggedBatch.build(
                [(sequence, piece, start) for sequence, piece in zip(sequences, pieces, strict=True)]
            )
            yield self._target.forward(batch, self._cache, capture=self._layers)
            for sequence, own, piece in zip(sequences, ids, pieces, strict=True):
                self._cache.commit(sequence, own, start + len(piece))
        for sequence in sequences:
            self._cache.close(sequence)

    def _features(self, tap: Tap, pieces: Sequence[Forward]) -> Tensor:
        return torch.cat([tap.project(piece.captured) for piece in pieces])

    def _log_z(self, hidden: Tensor, temperature: float) -> Tensor:
        pieces = [
            torch.logsumexp(self._target.logits(rows).float() / temperature, -1)
            for rows in torch.split(hidden, _LAW_ROWS)
        ]
        return torch.cat(pieces).double()
