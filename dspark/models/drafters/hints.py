"""What a lookup in the text says, as an input of a block: an addition of this project to DSpark (§2.2).

The text's present end is looked up in the text itself, and what followed it the last time is a guess at the block. The
row that predicts token k is told the k-th guess: x_k += s_m · W E[g_k] + v_m, where m is how many ids of the end agreed
(`DrafterConfig.hint_lengths`). A small drafter learns copying last; told what there is to copy, it has to learn only
when. Of committed ids alone, so that a draft stays what text and state of the target say. Knows no text: who looks
things up hands over `Hints`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

__all__ = ["HintInput", "Hints"]


class Hints(NamedTuple):
    """Guesses at blocks of n tokens: `tokens` (…, n) int64 target ids, `kinds` (…,) int64.

    Kind 0 is no guess, whatever the tokens; kind i > 0 that i-th of the lengths looked up agreed.
    """

    tokens: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> Hints:
        """The same on another device."""
        return Hints(self.tokens.to(device), self.kinds.to(device))


class HintInput(nn.Module):
    """Guesses as rows to add to a block's inputs. Adds nothing before it is trained."""

    def __init__(self, hint_lengths: Sequence[int], width: int) -> None:
        super().__init__()
        kinds = len(hint_lengths) + 1
        self.proj = nn.Linear(width, width, bias=False)
        self.kind = nn.Embedding(kinds, width)
        self.strength = nn.Parameter(torch.ones(kinds))
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.kind.weight)

    def forward(self, embedded: Tensor, kinds: Tensor) -> Tensor:
        """Embedded guesses (…, n, d) and their kinds (…,): (…, n, d) to add."""
        strength = (self.strength[kinds] * (kinds > 0)).to(embedded.dtype)
        rows = self.proj(embedded) * strength[..., None, None]
        return cast("Tensor", rows + self.kind(kinds).to(rows.dtype)[..., None, :])
