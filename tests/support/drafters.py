"""Small random drafters in the published checkpoint format, and a plain reading of what they should compute."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspark.models.drafters import save_drafter
from support.drafting import make_any

VOCAB, HIDDEN, RANK, BLOCK = 96, 32, 8, 5
HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 4, 2, 8, 48, 2
LAYER_IDS = (0, 2)
THETA = 10_000.0


def published_config(head: str = "vanilla", **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3DSparkModel"],
        "attention_bias": False,
        "block_size": BLOCK,
        "confidence_head_with_markov": True,
        "enable_confidence_head": True,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "markov_head_type": head,
        "markov_rank": RANK,
        "mask_token_id": VOCAB - 1,
        "max_position_embeddings": 512,
        "model_type": "qwen3",
        "num_anchors": 8,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_target_layers": 5,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
        "sliding_window": None,
        "target_layer_ids": list(LAYER_IDS),
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
    } | changes


def published_tensors(head: str = "vanilla", *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, scale: float = 0.3, shift: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale + shift

    tensors = {
        "embed_tokens.weight": make(VOCAB, HIDDEN, scale=1.0),
        "lm_head.weight": make(VOCAB, HIDDEN),
        "fc.weight": make(HIDDEN, HIDDEN * len(LAYER_IDS)),
        "hidden_norm.weight": make(HIDDEN, scale=0.1, shift=1.0),
        "norm.weight": make(HIDDEN, scale=0.1, shift=1.0),
        "markov_head.markov_w1.weight": make(VOCAB, RANK, scale=1.0),
        "markov_head.markov_w2.weight": make(VOCAB, RANK),
        "confidence_head.proj.weight": make(1, HIDDEN + RANK),
        "confidence_head.proj.bias": make(1),
    }
    if head == "gated":
        tensors["markov_head.gate_proj.weight"] = make(RANK, HIDDEN + RANK)
        tensors["markov_head.gate_proj.bias"] = make(RANK)
    if head == "rnn":
        tensors["markov_head.joint_proj.weight"] = make(3 * RANK, 2 * RANK + HIDDEN)
        tensors["markov_head.joint_proj.bias"] = make(3 * RANK)
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": make(HIDDEN, scale=0.1, shift=1.0),
            at + "post_attention_layernorm.weight": make(HIDDEN, scale=0.1, shift=1.0),
            at + "self_attn.q_proj.weight": make(HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": make(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": make(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": make(HIDDEN, HEADS * HEAD_DIM),
            at + "self_attn.q_norm.weight": make(HEAD_DIM, scale=0.1, shift=1.0),
            at + "self_attn.k_norm.weight": make(HEAD_DIM, scale=0.1, shift=1.0),
            at + "mlp.gate_proj.weight": make(INNER, HIDDEN),
            at + "mlp.up_proj.weight": make(INNER, HIDDEN),
            at + "mlp.down_proj.weight": make(HIDDEN, INNER),
        }
    return tensors


def save_published(directory: Path, head: str = "vanilla", *, seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(head, seed=seed)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(published_config(head, **changes)))
    return tensors


def save_random(directory: Path, architecture: str, **changes: Any) -> Path:
    """A random drafter of any architecture in this project's layout, for a target of these shapes."""
    shapes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "num_target_layers": 5,
        "target_layer_ids": LAYER_IDS,
        "mask_token_id": VOCAB - 1,
        "block_size": 7,
        "name": architecture,
    }
    save_drafter(make_any(architecture, **(shapes | changes)), directory, dtype=torch.float32)
    return directory


class PlainDrafter:
    """One block at temperature 0, a row and a head at a time, straight from the tensors."""

    def __init__(self, tensors: dict[str, Tensor], head: str) -> None:
        self.t = tensors
        self.head = head

    def draft(self, captured: Tensor, anchor: int) -> tuple[list[int], list[float], list[float]]:
        """Tokens, confidence logits and corrected top logits, from hidden states (n, layers, d)."""
        context = self._norm(captured.flatten(1) @ self.t["fc.weight"].T, "hidden_norm")
        hidden = self.hidden(context, anchor)
        tokens, confidences, tops = [], [], []
        previous, state = anchor, torch.zeros(RANK)
        for k in range(BLOCK):
            embedded = self.t["markov_head.markov_w1.weight"][previous]
            latent, state = self._latent(state, embedded, hidden[k])
            logits = self.t["lm_head.weight"] @ hidden[k] + self.t["markov_head.markov_w2.weight"] @ latent
            inputs = torch.cat([hidden[k], embedded])
            logit = self.t["confidence_head.proj.weight"][0] @ inputs + self.t["confidence_head.proj.bias"][0]
            previous = int(logits.argmax())
            tokens.append(previous)
            confidences.append(float(logit))
            tops.append(float(logits.max()))
        return tokens, confidences, tops

    def hidden(self, context: Tensor, anchor: int) -> Tensor:
        n = len(context)
        x = self.t["embed_tokens.weight"][[anchor] + [VOCAB - 1] * (BLOCK - 1)]
        for layer in range(LAYERS):
            at = f"layers.{layer}."
            x = x + self._attention(at + "self_attn.", self._norm(x, at + "input_layernorm"), context, n)
            y = self._norm(x, at + "post_attention_layernorm")
            gate = torch.nn.functional.silu(y @ self.t[at + "mlp.gate_proj.weight"].T)
            x = x + (gate * (y @ self.t[at + "mlp.up_proj.weight"].T)) @ self.t[at + "mlp.down_proj.weight"].T
        return self._norm(x, "norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.t[name + ".weight"]

    def _attention(self, at: str, x: Tensor, context: Tensor, n: int) -> Tensor:
        rows = torch.cat([context, x])
        outputs = []
        for head in range(HEADS):
            shared = slice(head // (HEADS // KV_HEADS) * HEAD_DIM, (head // (HEADS // KV_HEADS) + 1) * HEAD_DIM)
            own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            query = self._norm(x @ self.t[at + "q_proj.weight"][own].T, at + "q_norm")
            key = self._norm(rows @ self.t[at + "k_proj.weight"][shared].T, at + "k_norm")
            query = torch.stack([_turn(row, n + i) for i, row in enumerate(query)])
            key = torch.stack([_turn(row, i) for i, row in enumerate(key)])
            weights = torch.softmax(query @ key.T / math.sqrt(HEAD_DIM), -1)
            outputs.append(weights @ (rows @ self.t[at + "v_proj.weight"][shared].T))
        return torch.cat(outputs, -1) @ self.t[at + "o_proj.weight"].T

    def _latent(self, state: Tensor, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        if self.head == "vanilla":
            return embedded, state
        if self.head == "gated":
            inputs = torch.cat([hidden, embedded])
            gate = self.t["markov_head.gate_proj.weight"] @ inputs + self.t["markov_head.gate_proj.bias"]
            return torch.sigmoid(gate) * embedded, state
        inputs = torch.cat([state, embedded, hidden])
        joint = self.t["markov_head.joint_proj.weight"] @ inputs + self.t["markov_head.joint_proj.bias"]
        gate, candidate, output = joint[:RANK], joint[RANK : 2 * RANK], joint[2 * RANK :]
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)


def _turn(row: Tensor, position: int) -> Tensor:
    """Rotary embedding by complex multiplication of the pairs (i, i + half)."""
    half = len(row) // 2
    angles = torch.tensor([position * THETA ** (-2 * i / len(row)) for i in range(half)])
    turned = torch.complex(row[:half], row[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag])
