"""The DSpark drafter: parallel backbone over injected target features, sequential head, confidence head (DSpark §3.1).

A block anchored at position n reads features of positions 0 … n-1 and is fed the anchor and n-1 masks; the anchor's row
predicts token 1. The same module serves (`context_kv`, `block_hidden`, one step of the head at a time) and is trained
(`training_hidden`, `head.unroll`). Leaves files to `checkpoint`, and choosing tokens to `dspark.sampling`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark.messages import DrafterInfo, TapInfo
from dspark.models.drafters.config import DrafterConfig
from dspark.models.drafters.heads import HEADS, ConfidenceHead, MarkovHead
from dspark.models.drafters.layers import KV, DraftLayer, RmsNorm, Rotary, rotary_table


class DSparkDrafter(nn.Module):
    """A drafter beside frozen tensors of its target.

    `embed_weight` (vocab, d) and `head_weight` (draft vocab, d) are the target's: buffers that no optimiser sees and no
    checkpoint of ours holds. `d2t` (draft vocab,) int64 gives target = i + d2t[i], or None for the whole vocabulary.
    """

    def __init__(
        self, config: DrafterConfig, *, embed_weight: Tensor, head_weight: Tensor, d2t: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        rank = config.markov_rank
        fc_inputs = len(config.target_layer_ids) * config.hidden_size
        self.fc = nn.Linear(fc_inputs, config.hidden_size, bias=config.fc_bias)
        self.hidden_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.markov_head = HEADS[config.markov_head_type](
            config.markov_rows, config.draft_vocab_size, rank, config.hidden_size
        )
        confidence_rank = rank if config.confidence_with_markov else 0
        self.confidence_head = ConfidenceHead(config.hidden_size, confidence_rank) if config.confidence_head else None
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if config.learned_mask else None
        self.embed_weight: Tensor
        self.head_weight: Tensor
        self.d2t: Tensor | None
        self.register_buffer("embed_weight", embed_weight, persistent=False)
        self.register_buffer("head_weight", head_weight, persistent=False)
        self.register_buffer("d2t", d2t, persistent=False)
        if d2t is not None:
            self.markov_head.rows = rows_of_tokens(d2t, config.vocab_size)

    # ------------------------------------------------------------ what others need to know

    @property
    def head(self) -> MarkovHead:
        """The sequential head: `initial_state(b)`, `step(state, previous ids, h_k)`."""
        return self.markov_head

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the config and every tensor of the drafter's own."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
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
            architecture="dspark",
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

    def context_kv(self, features: Tensor, positions: Tensor) -> list[KV]:
        """Per draft layer K (…, kv heads, head_dim), normed and rotated, and V; features (…, d), positions (…,)."""
        tables = self._rotary(positions, features.dtype)
        return [
            layer.self_attn.keys_values(features, table) for layer, table in zip(self._layers(), tables, strict=True)
        ]

    # ------------------------------------------------------------ blocks

    def block_hidden(self, anchors: Tensor, positions: Tensor, context: Sequence[KV], lengths: Tensor) -> Tensor:
        """One forward of a block a row: (b, n, d) after the final norm.

        `anchors` (b,) target ids at `positions` (b,). `context`: per draft layer K and V (b, L, kv heads, head_dim), of
        which row i sees the first `lengths[i]`; inside a block every row sees every row.
        """
        b, block, longest = len(anchors), self.config.block_size, context[0][0].shape[1]
        seen = torch.arange(longest, device=anchors.device) < lengths[:, None]
        own = torch.ones(b, block, dtype=torch.bool, device=anchors.device)
        mask = torch.cat([seen, own], 1)[:, None, None].expand(b, 1, block, longest + block)
        return self._run(self._block_inputs(anchors), self._block_positions(positions), context, mask)

    def training_hidden(self, captured: Tensor, token_ids: Tensor, anchors: Tensor) -> Tensor:
        """Many blocks of each sequence in one forward: (s, a, n, d) after the final norm.

        `captured` (s, t, m, d) hidden states and `token_ids` (s, t) of whole sequences, `anchors` (s, a) positions. A
        block sees the context before its anchor and itself only, exactly as when served.
        """
        s, a = anchors.shape
        block, t = self.config.block_size, captured.shape[1]
        positions = torch.arange(t, device=captured.device).expand(s, t)
        context = self.context_kv(self.features(captured), positions)
        inputs = self._block_inputs(token_ids.gather(1, anchors).flatten()).view(s, a * block, -1)
        rows = self._block_positions(anchors.flatten()).view(s, a * block)
        mask = block_mask(anchors, block, t)
        return self._run(inputs, rows, context, mask).view(s, a, block, -1)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U: (…, d) -> (…, draft vocabulary)."""
        return functional.linear(hidden, self.head_weight.to(hidden.dtype))

    def confidence_logits(self, hidden: Tensor, previous: Tensor) -> Tensor | None:
        """Logits of c_k (b,) from h_k (b, d) and x_{k-1} (b,) as target ids; None without a confidence head."""
        if self.confidence_head is None:
            return None
        return cast("Tensor", self.confidence_head(hidden, self.markov_head.previous(previous)))

    # ------------------------------------------------------------ inside

    def _layers(self) -> list[DraftLayer]:
        return cast("list[DraftLayer]", list(self.layers))

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> list[Rotary]:
        thetas = self.config.rope_thetas
        tables = {theta: rotary_table(positions, self.config.head_dim, theta, dtype) for theta in set(thetas)}
        return [tables[theta] for theta in thetas]

    def _block_inputs(self, anchors: Tensor) -> Tensor:
        """Embeddings of anchor and n-1 masks, (b, n, d)."""
        masks = anchors.new_full((len(anchors), self.config.block_size - 1), self.config.mask_token_id)
        if self.mask_embedding is None:
            return self._embed(torch.cat([anchors[:, None], masks], 1))
        anchor = self._embed(anchors)[:, None]
        return torch.cat([anchor, self.mask_embedding.to(anchor.dtype).expand(*masks.shape, -1)], 1)

    def _embed(self, token_ids: Tensor) -> Tensor:
        return functional.embedding(token_ids, self.embed_weight) * self.config.embedding_scale

    def _block_positions(self, positions: Tensor) -> Tensor:
        return positions[:, None] + torch.arange(self.config.block_size, device=positions.device)

    def _run(self, x: Tensor, positions: Tensor, context: Sequence[KV], mask: Tensor) -> Tensor:
        tables = self._rotary(positions, context[0][0].dtype)
        for layer, table, kv in zip(self._layers(), tables, context, strict=True):
            x = layer(x, table, kv, mask)
        return cast("Tensor", self.norm(x))


def block_mask(anchors: Tensor, block: int, context_length: int) -> Tensor:
    """Which keys the rows of many blocks see: (s, 1, a·n, t + a·n) bool, for anchor positions (s, a).

    Keys are t context positions, then the blocks' own rows: a row sees the context before its anchor and its own block.
    """
    s, a = anchors.shape
    before = torch.arange(context_length, device=anchors.device) < anchors[..., None]
    same = torch.eye(a, dtype=torch.bool, device=anchors.device).repeat_interleave(block, 1).expand(s, a, a * block)
    return torch.cat([before, same], -1).repeat_interleave(block, 1)[:, None]


def rows_of_tokens(d2t: Tensor, vocab_size: int) -> Tensor:
    """(vocab,) int64: each target id's index in the draft vocabulary, len(d2t) for ids outside it."""
    ids = torch.arange(len(d2t), device=d2t.device) + d2t
    rows = torch.full((vocab_size,), len(d2t), dtype=torch.int64, device=d2t.device)
    rows[ids] = torch.arange(len(d2t), device=d2t.device)
    return rows


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
