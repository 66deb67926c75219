"""The target's hidden states of texts, computed while training and served as batches (DSpark §3.3, §5.1).

Kept are the captured layers, the final hidden state and log Z of the target's logits, in bounded `States`: on disk, or
on a card in its own memory. What does not fit is computed again each time. Logits are never kept: the loss makes those
it needs from the hidden state.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dspark.models.batch import RaggedBatch
from dspark.models.drafters import Hints
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from services.draft.hints import hints_along
from services.verifier.step import split
from training.dataset import Texts
from training.state_cache import States, TextStates
from training.state_memory import StateMemory

__all__ = ["Batch", "Hinted", "TargetStates", "rms_normalise"]

_PAGE_SIZE = 16
_HEAD_ROWS = {"cpu": 128, "cuda": 512}
_SUMMED_ROWS = {"cpu": 8, "cuda": 128}  # of logits: on a CPU, while they are in its caches
_FILLED_TOKENS = 32_768  # of one forward


@dataclass(frozen=True, slots=True)
class Batch:
    """Some texts padded to t tokens: `captured` (s, t, m, d), `hidden` (s, t, d), `logz` and `token_ids` (s, t).

    Rows past a text's end hold anything.
    Captured layers are divided by their root mean square unless told otherwise. `logz` is float32, log of the sum of
    exp(logits), and means something at positions from `prompt_lengths` on only. `hints`: (s, t, n) and (s, t), for
    blocks anchored at each of these positions, where they are asked for.
    """

    captured: Tensor
    hidden: Tensor
    logz: Tensor
    token_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    temperatures: Tensor
    hints: Hints | None = None


class Hinted(NamedTuple):
    """Which hints a drafter takes: the lengths looked up, and the tokens of a block."""

    lengths: tuple[int, ...]
    tokens: int


class TargetStates:
    """Batches of a data set's texts, their states computed by the target."""

    def __init__(
        self,
        texts: Texts,
        target: TargetModel,
        layer_ids: Sequence[int],
        cache: States | None = None,
        *,
        dtype: torch.dtype | None = None,
        normalise: bool = True,
        hinted: Hinted | None = None,
    ) -> None:
        """`dtype`: of the batches' states, the target's own by default."""
        self.texts = texts
        self._target, self._dtype = target, dtype or target.dtype
        self._layer_ids = tuple(layer_ids)
        self._cache = cache
        self._normalise = normalise
        self._hinted = hinted
        self._kv: KVCache | None = None
        self._hints: dict[int, Hints] = {}
        self._kv_pages = 0
        self.computed = 0
        """Texts whose states were computed rather than found."""

    @property
    def cache_bytes(self) -> int:
        """What the cache takes."""
        return self._cache.bytes if self._cache else 0

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts.token_ids), default=0)

    def batch(self, rows: Sequence[int], *, width: int = 0) -> Batch:
        """The texts at `rows`, padded at the end to the longest of them or to `width`, on the target's device."""
        width = max(width, *(len(self.texts.token_ids[row]) for row in rows))
        states = self._together(rows, width)
        captured = states.captured.to(self._target.device, self._dtype)
        lengths = torch.tensor([len(self.texts.token_ids[row]) for row in rows])
        device = self._target.device
        return Batch(
            captured=captured if not self._normalise else rms_normalise(captured, self._target.config.rms_norm_eps),
            hidden=states.hidden.to(device, self._dtype),
            logz=states.logz.to(device),
            token_ids=_padded([self.texts.token_ids[row].long() for row in rows], width).to(device),
            lengths=lengths.to(device),
            prompt_lengths=torch.tensor([self.texts.prompt_lengths[row] for row in rows], device=device),
            temperatures=torch.tensor([self.texts.temperatures[row] for row in rows], device=device),
            hints=None if self._hinted is None else self._hints_of(rows, self._hinted, width).to(device),
        )

    def fill(self, rows: Sequence[int]) -> None:
        """Compute what a card's memory will keep of these texts, many at once: one step's are too few to fill it."""
        memory = self._cache
        if isinstance(memory, StateMemory):
            kept = [row for row in rows if memory.keeps(row)]
            for some in split(kept, _FILLED_TOKENS, lambda row: len(self.texts.token_ids[row])):
                self._states(some)
            self._kv, self._kv_pages = None, 0  # a step's texts need less

    def _hints_of(self, rows: Sequence[int], hinted: Hinted, width: int) -> Hints:
        """Looked up once a text, and kept: for blocks of seven 29 bytes a token."""
        for row in rows:
            if row not in self._hints:
                ids, first = self.texts.token_ids[row].tolist(), self.texts.prompt_lengths[row]
                found = hints_along(ids, first, hinted.lengths, hinted.tokens)
                self._hints[row] = Hints(found.tokens.int(), found.kinds.to(torch.uint8))
        columns = zip(*(self._hints[row] for row in rows), strict=True)
        return Hints(*(_padded(column, width).long() for column in columns))

    def _together(self, rows: Sequence[int], width: int) -> TextStates:
        """The texts' states (s, width, …)."""
        states, memory = self._states(rows), self._cache
        if isinstance(memory, StateMemory) and all(memory.has(row) for row in rows):
            return memory.together(rows, width)
        return TextStates(*(_padded(column, width) for column in zip(*states, strict=True)))

    def _states(self, rows: Sequence[int]) -> list[TextStates]:
        found = {row: self._cache.get(row) if self._cache else None for row in rows}
        missing = [row for row, states in found.items() if states is None]
        if missing:
            for row, computed in zip(missing, self._compute(missing), strict=True):
                found[row] = computed
                if self._cache:
                    self._cache.put(row, computed)
        return [states for row in rows if (states := found[row]) is not None]

    @torch.inference_mode()
    def _compute(self, rows: Sequence[int]) -> list[TextStates]:
        """One forward over whole texts."""
        self.computed += len(rows)
        ids = [self.texts.token_ids[row].tolist() for row in rows]
        cache = self._room(ids)
        places = [cache.open(text, len(text) + 1) for text in ids]
        batch = RaggedBatch.build([(place, text, 0) for place, text in zip(places, ids, strict=True)])
        forward = self._target.forward(batch, cache, capture=frozenset(self._layer_ids))
        for place in places:
            cache.close(place)
        captured = torch.stack([forward.captured[layer] for layer in self._layer_ids], 1).bfloat16()
        spans = list(itertools.pairwise(batch.first_rows))
        firsts = [self.texts.prompt_lengths[row] for row in rows]
        logz = self._logz(forward.hidden, [range(a + first, b) for (a, b), first in zip(spans, firsts, strict=True)])
        return [TextStates(captured[a:b], forward.hidden[a:b].bfloat16(), logz[a:b]) for a, b in spans]

    def _logz(self, hidden: Tensor, answers: Sequence[range]) -> Tensor:
        """Log Z (t,) of the rows in `answers`, 0 elsewhere.

        On a CPU each answer by itself, so that its bits do not depend on whose states are missing beside it.
        """
        logz = torch.zeros(len(hidden), device=hidden.device)
        kind = hidden.device.type
        groups = answers if kind == "cpu" else [[row for rows in answers for row in rows]]
        for group in groups:
            wanted = torch.tensor(list(group), dtype=torch.int64, device=hidden.device)
            for some in torch.split(wanted, _HEAD_ROWS.get(kind, _HEAD_ROWS["cpu"])) if len(wanted) else ():
                seen = hidden[some].to(self._dtype).to(hidden.dtype)  # as the loss, which computes them again, has them
                logits = self._target.logits(seen).to(self._dtype)
                summed = torch.split(logits, _SUMMED_ROWS.get(kind, _SUMMED_ROWS["cpu"]))
                logz[some] = torch.cat([torch.logsumexp(rows.float(), -1) for rows in summed])
        return logz

    def _room(self, ids: Sequence[Sequence[int]]) -> KVCache:
        """K/V pages for one forward, kept for the next."""
        pages = sum(len(text) // _PAGE_SIZE + 2 for text in ids) + len(ids)
        pages = max(pages, len(ids) * (max(map(len, ids)) // _PAGE_SIZE + 3))
        if self._kv is None or self._kv_pages < pages:
            target, self._kv_pages = self._target, pages
            self._kv = KVCache(
                target.config,
                pages=pages,
                dtype=target.kept_dtype,
                device=target.device,
                prefix_cache=False,
                max_step_rows=sum(map(len, ids)),
            )
        return self._kv


def rms_normalise(captured: Tensor, eps: float) -> Tensor:
    """Every (…, d) row divided by its root mean square, in the rows' dtype."""
    wide = captured.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(captured.dtype)


def _padded(rows: Sequence[Tensor], width: int) -> Tensor:
    """(t_i, …) tensors as one (s, width, …), filled up with zeros."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    missing = width - padded.shape[1]
    return functional.pad(padded, (0, 0) * (padded.dim() - 2) + (0, missing)) if missing else padded
