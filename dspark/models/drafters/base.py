"""What all drafters share: the projection of target states, the target's own tensors, and how others know them.

A drafter reads target hidden states through its tap, H = RMSNorm(W_c [H^(l_1); …; H^(l_m)]) (DSpark §2.2), and chooses
from logits of the target's output head, over all or a part of the vocabulary. How a block comes about is each
architecture's own affair; files are `checkpoint`'s, choosing tokens is `dspark.sampling`'s.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark.messages import DrafterInfo, TapInfo
from dspark.models.drafters.config import DrafterConfig
from dspark.models.drafters.hints import Hints
from dspark.models.drafters.layers import DraftLayer, RmsNorm, Rotary, rotary_table

__all__ = ["Drafter"]


class Drafter(nn.Module, ABC):
    """A drafter beside frozen tensors of its target.

    `embed_weight` (vocab, d) and `head_weight` (draft vocab, d) are the target's: buffers that no optimiser sees and no
    checkpoint of ours holds. The embedding may be narrower than the head, in whose dtype the drafter computes. `d2t`
    (draft vocab,) int64 gives target = i + d2t[i], or None for the whole vocabulary.
    """

    def __init__(
        self, config: DrafterConfig, *, embed_weight: Tensor, head_weight: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        fc_inputs = len(config.target_layer_ids) * config.hidden_size
        self.fc = nn.Linear(fc_inputs, config.hidden_size, bias=config.fc_bias)
        self.hidden_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.embed_weight: Tensor
        self.head_weight: Tensor
        self.d2t: Tensor | None
        self.rows: Tensor | None
        self.register_buffer("embed_weight", embed_weight, persistent=False)
        self.register_buffer("head_weight", head_weight, persistent=False)
        self.register_buffer("d2t", d2t, persistent=False)
        rows = None if d2t is None else rows_of_tokens(d2t, config.vocab_size)
        self.register_buffer("rows", rows, persistent=False)

    # ------------------------------------------------------------ training

    @abstractmethod
    def training_hidden(
        self,
        captured: Tensor,
        token_ids: Tensor,
        anchors: Tensor,
        length: int | None = None,
        hints: Hints | None = None,
    ) -> Tensor:
        """Many blocks of each sequence in one forward: (s, a, n, d), what the head reads for draft tokens 1 … n.

        Blocks are of n = `length` tokens, by default of as many as when served.
        `captured` (s, t, m, d) hidden states and `token_ids` (s, t) of whole sequences, `anchors` (s, a) positions. A
        block sees the context before its anchor and itself only, exactly as when served, and is fed the sequence's own
        tokens where it takes any. `hints`: (s, a, n') and (s, a), n' ≥ n, for a drafter that takes them.
        """

    def sequential_logits(self, previous: Tensor, hidden: Tensor) -> Tensor | None:
        """B_k of known blocks: (b, n, draft vocabulary) from x_{k-1} (b, n) and h_k (b, n, d); None without a head."""
        del previous, hidden
        return None

    def confidences(self, previous: Tensor, hidden: Tensor) -> Tensor | None:
        """Logits of c_k (b, n) from x_{k-1} (b, n) as target ids and h_k (b, n, d); None without a confidence head."""
        del previous, hidden
        return None

    # ------------------------------------------------------------ what others need to know

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config and every tensor of the drafter's own; calibration is not part of it.

        Nor are additions that the drafter does without: it is what it was before there were any.
        """
        facts = asdict(replace(self.config, calibration=()))
        for addition in ("hint_lengths", "cut_lengths"):
            if not facts[addition]:
                del facts[addition]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + _bytes(tensor))
        return digest.hexdigest()

    @cached_property
    def tap(self) -> TapInfo:
        """The projection that a verify worker computes for this drafter (DSpark §2.2)."""
        config = self.config
        fields = {
            "layer_ids": config.target_layer_ids,
            "target_hidden_size": config.hidden_size,
            "feature_size": config.hidden_size,
            "norm_eps": config.rms_norm_eps,
            "target_vocab_size": config.vocab_size,
            "model_fingerprint": config.model_fingerprint,
            "normalize_inputs": config.normalize_inputs,
        }
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for name, tensor in sorted(self.tap_tensors().items()):
            digest.update(name.encode() + _bytes(tensor))
        return TapInfo(tap_id=digest.hexdigest(), **fields)  # type: ignore[arg-type]

    def tap_tensors(self) -> dict[str, Tensor]:
        """On the CPU in float32: `fc.weight` (d, m·d), `hidden_norm.weight` (d,) and maybe `fc.bias` (d,)."""
        tensors = {"fc.weight": self.fc.weight, "hidden_norm.weight": self.hidden_norm.weight}
        if self.config.fc_bias:
            tensors["fc.bias"] = self.fc.bias
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}

    @property
    def info(self) -> DrafterInfo:
        """What a draft worker says about itself."""
        return DrafterInfo(
            name=self.config.name,
            architecture=self.config.architecture,
            fingerprint=self.fingerprint,
            tap_id=self.tap.tap_id,
            model_fingerprint=self.config.model_fingerprint,
            vocab_size=self.config.vocab_size,
            draft_vocab_size=self.config.draft_vocab_size,
            block_size=self.config.block_size,
        )

    # ------------------------------------------------------------ context

    def features(self, captured: Tensor) -> Tensor:
        """H_ctx = RMSNorm(W_c [H^(l_1); …; H^(l_m)]): captured (…, m, d) hidden states -> (…, d) (DSpark §2.2)."""
        if self.config.normalize_inputs:
            wide = captured.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
            captured = wide.to(captured.dtype)
        return cast("Tensor", self.hidden_norm(self.fc(captured.flatten(-2))))

    # ------------------------------------------------------------ shared arithmetic

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U: (…, d) -> (…, draft vocabulary)."""
        return functional.linear(hidden, self.head_weight.to(hidden.dtype))

    def embed(self, token_ids: Tensor) -> Tensor:
        """The target's embedding (…, d), scaled as the target scales it."""
        rows = functional.embedding(token_ids, self.embed_weight).to(self.head_weight.dtype)
        return rows * self.config.embedding_scale

    def _layers(self) -> list[DraftLayer]:
        return cast("list[DraftLayer]", list(self.layers))

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> list[Rotary]:
        thetas = self.config.rope_thetas
        tables = {theta: rotary_table(positions, self.config.head_dim, theta, dtype) for theta in set(thetas)}
        return [tables[theta] for theta in thetas]


def rows_of_tokens(d2t: Tensor, vocab_size: int) -> Tensor:
    """(vocab,) int64: each target id's index in the draft vocabulary, len(d2t) for ids outside it."""
    ids = torch.arange(len(d2t), device=d2t.device) + d2t
    rows = torch.full((vocab_size,), len(d2t), dtype=torch.int64, device=d2t.device)
    rows[ids] = torch.arange(len(d2t), device=d2t.device)
    return rows


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
