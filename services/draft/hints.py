"""Lookups in a sequence's own text as hints for a block: how served contexts and trained texts come to the same ones.

Leaves what a drafter makes of hints to `dspark.models.drafters.hints`, and the index of a text to `ngram`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import Hints, ParallelDrafter
from dspark.models.drafters.hints import HintInput
from services.draft.ngram import NgramContext

__all__ = ["ServedHints", "hints_along", "hints_of"]


def hints_of(contexts: Sequence[NgramContext], hint_lengths: Sequence[int], count: int) -> Hints:
    """(b, count) guesses at what follows these texts, and their kinds (b,)."""
    kinds = {length: kind for kind, length in enumerate(hint_lengths, 1)}
    matches = [context.lookup(count) for context in contexts]
    tokens = [match.tokens or [0] * count for match in matches]
    return Hints(torch.tensor(tokens), torch.tensor([kinds.get(match.matched, 0) for match in matches]))


def hints_along(token_ids: Sequence[int], first: int, hint_lengths: Sequence[int], count: int) -> Hints:
    """Hints for blocks anchored at each position of a text, (t, count) and (t,); of kind 0 before position `first`.

    As served: an anchor's text are the ids of positions 1 to its own.
    """
    context = NgramContext(hint_lengths)
    context.append(token_ids[1:first])
    tokens = torch.zeros(len(token_ids), count, dtype=torch.int64)
    kinds = torch.zeros(len(token_ids), dtype=torch.int64)
    for place in range(max(first, 1), len(token_ids)):
        context.append(token_ids[place : place + 1])
        one = hints_of([context], hint_lengths, count)
        tokens[place], kinds[place] = one.tokens[0], one.kinds[0]
    return Hints(tokens, kinds)


class ServedHints:
    """A drafter's `HintInput`, arranged for speed."""

    def __init__(self, drafter: ParallelDrafter, hints: HintInput, kernels: Kernels) -> None:
        self._lengths = drafter.config.hint_lengths
        self._proj = kernels.linear(hints.proj.weight)
        self._kind = hints.kind.weight
        self._strength = hints.strength.detach().clone()
        self._strength[0] = 0.0

    def open(self) -> NgramContext:
        """The index of a new text."""
        return NgramContext(self._lengths)

    def rows(self, texts: Sequence[NgramContext | None], count: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What to add to the inputs of one block of `count` rows behind each text, (b, count, d)."""
        hints = hints_of([text for text in texts if text is not None], self._lengths, count)
        tokens, kinds = hints.to(self._kind.device)
        guesses = self._proj(embed(tokens).flatten(0, 1)).view(len(texts), count, -1)
        return guesses * self._strength[kinds][:, None, None] + self._kind[kinds][:, None]
