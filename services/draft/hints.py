"""Lookups in a sequence's own text as hints for a block: how served contexts and trained texts come to the same ones.

Leaves what a drafter makes of hints to `dspark.models.drafters.hints`, and the index of a text to `ngram`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dspark.kernels import Kernels
from dspark.models.drafters import Hints, ParallelDrafter
from dspark.models.drafters.hints import HintInput
from services.draft.ngram import NgramContext

__all__ = ["ServedHints", "hints_along", "hints_of"]


def hints_of(contexts: Sequence[NgramContext], hint_lengths: Sequence[int], count: int) -> Hints:
    """(b, count) guesses at what follows these texts, and their kinds (b,)."""
    kinds = _kinds(hint_lengths)
    tokens, found = zip(*(_told(context, kinds, count) for context in contexts), strict=True)
    return Hints(torch.tensor(tokens), torch.tensor(found))


def hints_along(token_ids: Sequence[int], first: int, hint_lengths: Sequence[int], count: int) -> Hints:
    """Hints for blocks anchored at each position of a text, (t, count) and (t,); of kind 0 before position `first`.

    As served: an anchor's text are the ids of positions 1 to its own.
    """
    context, kinds = NgramContext(hint_lengths, judged=False), _kinds(hint_lengths)
    first = max(first, 1)
    context.append(token_ids[1:first])
    tokens, found = [[0] * count] * first, [0] * first
    for token_id in token_ids[first:]:
        context.append([token_id])
        guess, kind = _told(context, kinds, count)
        tokens.append(guess)
        found.append(kind)
    return Hints(torch.tensor(tokens), torch.tensor(found))


def _told(context: NgramContext, kinds: Mapping[int, int], count: int) -> tuple[list[int], int]:
    """The guess at what follows a text, and its kind."""
    match = context.lookup(count)
    return list(match.tokens) or [0] * count, kinds.get(match.matched, 0)


def _kinds(hint_lengths: Sequence[int]) -> dict[int, int]:
    return {length: kind for kind, length in enumerate(hint_lengths, 1)}


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
        return NgramContext(self._lengths, judged=False)

    def rows(self, texts: Sequence[NgramContext], count: int, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What to add to the inputs of one block of `count` rows behind each text, (b, count, d)."""
        tokens, kinds = hints_of(texts, self._lengths, count).to(self._kind.device)
        guesses = self._proj(embed(tokens.flatten())).view(len(texts), count, -1)
        strength = self._strength.index_select(0, kinds).view(-1, 1, 1)
        return guesses.mul_(strength).add_(self._kind.index_select(0, kinds).unsqueeze(1))
