"""Proposes blocks along known texts with the served draft engine, fed from memory.

The one place that knows `services.draft`: features, ids, proposals and choosers are those of a draft worker. Leaves
rounds and acceptance to `training.rounds`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dspark.devices import pick_numerics
from dspark.kernels import Kernels
from dspark.messages import AttachSequence, FeatureBlock, Mode, ProposeItem, Sampling, SequenceKey
from dspark.models.drafters import Drafter
from dspark.sampling import DraftChooser
from services.draft.engine import DraftEngine
from services.draft.ngram import PromptLookup
from training.reverse import ReverseChooser
from training.texts import Observed

__all__ = ["AnyDrafter", "Proposer", "block_size_of"]

AnyDrafter = Drafter | PromptLookup

_CPU = torch.device("cpu")
_ROOM = 256  # context positions a text beside its own: more than the rows of a block

Asked = Sequence[tuple[int, int]]
"""Texts by number, each with its committed length N."""


def block_size_of(drafter: AnyDrafter) -> int:
    """Most tokens that it drafts a round."""
    return drafter.block_size if isinstance(drafter, PromptLookup) else drafter.config.block_size


class Proposer:
    """Proposes blocks for numbered texts that were begun and have not ended."""

    def __init__(
        self,
        drafter: AnyDrafter,
        setting: str,
        texts: Sequence[Observed],
        *,
        batch: int,
        draft_top_k: int,
        verify_length: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """For `batch` of the texts at once; other settings as `training.rounds.play`'s."""
        self.block_size = block_size_of(drafter)
        self._most = self.block_size if verify_length is None else min(verify_length, self.block_size)
        model = drafter if isinstance(drafter, Drafter) else None
        self._tap_id = model.tap.tap_id if model else ""
        self._mode = Mode.REJECTION if setting == "rejection" else Mode.COUPLED
        self._reverse = ReverseChooser(draft_top_k=draft_top_k) if setting == "rejection" else None
        device = model.norm.weight.device if model else _CPU
        kernels = kernels or pick_numerics("auto", "auto", device, weights="auto").kernels
        longest = max((one.text.max_len for one in texts), default=1)
        self._engine = DraftEngine(
            drafter,
            self._reverse or DraftChooser(draft_top_k=draft_top_k, bits=kernels.keyed_bits),
            kernels,
            context_positions=batch * (longest + _ROOM),
        )
        self._texts: dict[int, Observed] = {}

    def begin(self, number: int, text: Observed) -> None:
        """Blocks of this text will be asked for, at growing committed lengths."""
        sampling = Sampling(temperature=text.text.temperature, seed=text.text.seed, mode=self._mode)
        self._engine.attach(AttachSequence(_key(number), "", sampling, text.text.max_len))
        self._texts[number] = text

    def end(self, number: int) -> None:
        """No more blocks of this text."""
        self._engine.detach([_key(number)])
        del self._texts[number]

    def propose(self, asked: Asked) -> tuple[Tensor, Tensor]:
        """Blocks: tokens int64 (b, n), -1 where there is none, and raw confidence logits float32 (b, n).

        Both are on the CPU. Logits are NaN where there is no token, and where the drafter does not say how sure it is.
        """
        self._engine.append_features([self._features(number, committed) for number, committed in asked])
        if self._reverse is not None:
            self._reverse.expect([self._texts[number] for number, _ in asked])
        items = [self._item(number, committed) for number, committed in asked]
        drafted = self._engine.draft(items)
        tokens, logits = drafted.tokens.cpu(), drafted.confidence_logits
        known = torch.full(tokens.shape, torch.nan) if logits is None else logits.float().cpu()
        lengths = torch.tensor([item.max_tokens for item in items])
        if drafted.lengths is not None:
            lengths = torch.minimum(lengths, torch.tensor(list(drafted.lengths)))
        missing = torch.arange(self.block_size) >= lengths[:, None]
        rest = (0, self.block_size - tokens.shape[1])
        tokens, known = functional.pad(tokens, rest), functional.pad(known, rest)
        return tokens.masked_fill(missing, -1), known.masked_fill(missing, torch.nan)

    def _features(self, number: int, committed: int) -> FeatureBlock:
        """What the engine lacks of positions 0 … N - 2, as the verify worker sends it."""
        text, start = self._texts[number], self._engine.length(_key(number)) or 0
        ids = text.text.token_ids[start + 1 : committed]
        data = b""
        if self._tap_id:
            rows = text.features[self._tap_id][start : committed - 1].cpu().contiguous()
            data = rows.view(torch.uint8).numpy().tobytes()
        return FeatureBlock(_key(number), start, len(ids), data, token_ids=ids)

    def _item(self, number: int, committed: int) -> ProposeItem:
        """As a router asks: for no more than the request may still emit beside the round's own token."""
        text = self._texts[number].text
        wanted = max(1, min(self._most, text.max_len - committed - 1))
        return ProposeItem(_key(number), committed, text.token_ids[committed - 1], wanted)


def _key(number: int) -> SequenceKey:
    return SequenceKey(str(number), 0)
