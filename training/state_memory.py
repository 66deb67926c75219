"""Hidden states of a data set's texts in the memory of a card, in a few long tensors that batches are gathered from.

A card computes states in less time than reading them back to it takes, so they stay where they are. Texts have places
in their order, as far as the bound allows; the others are computed each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.state_cache import TextStates

__all__ = ["StateMemory"]


class StateMemory:
    """A text's states by its number, and those of several texts side by side."""

    def __init__(
        self, lengths: Sequence[int], *, layers: int, width: int, gigabytes: float, device: torch.device
    ) -> None:
        """`lengths` are the texts' in tokens; states are of `layers` captured layers of `width` numbers."""
        ends = torch.tensor([0, *lengths]).cumsum(0)
        token_bytes = 2 * (layers + 1) * width + 4
        kept = int(torch.searchsorted(ends * token_bytes, int(gigabytes * 1e9), right=True)) - 1
        tokens = int(ends[kept])
        self.bytes = tokens * token_bytes
        self._starts, self._lengths = ends[:kept].to(device), torch.tensor(lengths[:kept], device=device)
        self._spans = list(zip(ends[:kept].tolist(), ends[1 : kept + 1].tolist(), strict=True))
        self._known = [False] * kept
        self._states = TextStates(
            torch.empty(tokens, layers, width, dtype=torch.bfloat16, device=device),
            torch.empty(tokens, width, dtype=torch.bfloat16, device=device),
            torch.empty(tokens, device=device),
        )

    def keeps(self, text: int) -> bool:
        """Whether the text has a place."""
        return text < len(self._known)

    def has(self, text: int) -> bool:
        """Whether the text's states are here."""
        return self.keeps(text) and self._known[text]

    def get(self, text: int) -> TextStates | None:
        """As `States.get`."""
        if not self.has(text):
            return None
        start, end = self._spans[text]
        whole = self._states
        return TextStates(whole.captured[start:end], whole.hidden[start:end], whole.logz[start:end])

    def put(self, text: int, states: TextStates) -> None:
        """As `States.put`."""
        if not self.keeps(text):
            return
        self._known[text] = True
        place = self.get(text)
        assert place is not None
        for ours, theirs in zip(place, states, strict=True):
            ours.copy_(theirs)

    def together(self, texts: Sequence[int], width: int) -> TextStates:
        """Texts that are all here, each as `width` rows: (s, width, …). Rows past a text's end hold anything."""
        rows = torch.tensor(texts, device=self._starts.device)
        within = torch.arange(width, device=rows.device).minimum(self._lengths[rows][:, None] - 1)
        at = self._starts[rows][:, None] + within
        return TextStates(*(tensor[at] for tensor in self._states))
