"""A GGUF file seen as a Hugging Face model: its config and its tensors, dequantised, under Hugging Face names.

Two conventions differ. llama.cpp stores Gemma's RMSNorm weights with the 1 already added, so it is taken off again;
and a tied output embedding is simply absent. Neither architecture permutes query or key rows. The tokenizer is
left to `dspark.models.convert`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dspark.errors import ModelFileError
from dspark.models.config import FULL, SLIDING
from dspark.models.weights import check_tensor

_ARCHITECTURES = {"gemma3": ("Gemma3ForCausalLM", "gemma3_text"), "qwen3": ("Qwen3ForCausalLM", "qwen3")}
# llama.cpp fixes these for Gemma 3; the file does not say them.
_GEMMA_PATTERN = 6
_GEMMA_LOCAL_THETA = 10_000.0
_GEMMA_27B_LAYERS = 62

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_LAYER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_QWEN_LAYER = {"post_attention_layernorm": "ffn_norm"}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)\.weight")


class GgufSource:
    """The tensors of a GGUF file under Hugging Face names, and `config`, the config.json it amounts to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = _open(path)
        self._architecture = str(self._value("general.architecture"))
        if self._architecture not in _ARCHITECTURES:
            known = ", ".join(sorted(_ARCHITECTURES))
            raise ModelFileError(f"{path}: architecture {self._architecture!r} is not supported (known: {known})")
        self._tensors = self._by_hf_name()
        self.config = self._config()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Every tensor's Hugging Face name, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The tensor dequantised to float32, then as `dtype`, contiguous, on the CPU."""
        if name not in self._tensors:
            raise ModelFileError(f"{self._path}: tensor {name} is missing")
        check_tensor(self.shape(name), shape, f"{self._path}: tensor {name}")
        values = self._dequantised(name).reshape(shape)
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            values -= 1.0
        return values.to(dtype)

    def lookup(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As `get`: the file's own formats cannot be read by rows."""
        return self.get(name, shape, dtype)

    def _dequantised(self, name: str) -> torch.Tensor:
        from gguf import dequantize  # noqa: PLC0415  # heavy, and wanted only with a GGUF file

        tensor = self._tensors[name]
        try:
            return torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise ModelFileError(f"{self._path}: tensor {name} of type {kind} is not readable: {error}") from error

    def _by_hf_name(self) -> dict[str, Any]:
        layer = {**_LAYER, **(_GEMMA_LAYER if self._architecture == "gemma3" else _QWEN_LAYER)}
        top = {ours: theirs for theirs, ours in _TOP.items()}
        inside = {ours: theirs for theirs, ours in layer.items()}
        tensors = {}
        for tensor in self._reader.tensors:
            match = _LAYER_NAME.fullmatch(tensor.name)
            if match and match[2] in inside:
                tensors[f"model.layers.{match[1]}.{inside[match[2]]}.weight"] = tensor
            elif tensor.name in top:
                tensors[top[tensor.name]] = tensor
        return tensors

    @property
    def first_token_id(self) -> int | None:
        """The token that the file wants texts to begin with, if any."""
        spoken = self._value("tokenizer.ggml.model", "") == "llama"  # such as Gemma's do so where nothing is said
        wanted, token = (
            self._value("tokenizer.ggml.add_bos_token", spoken),
            self._value("tokenizer.ggml.bos_token_id", -1),
        )
        return int(token) if wanted and token >= 0 else None

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(key)
        if field is not None:
            return field.contents()
        if default is not None:
            return default
        raise ModelFileError(f"{self._path}: metadata {key} is missing")

    def _of(self, key: str, default: Any = None) -> Any:
        return self._value(f"{self._architecture}.{key}", default)

    def _config(self) -> dict[str, Any]:
        architecture, model_type = _ARCHITECTURES[self._architecture]
        heads, hidden = self._of("attention.head_count"), self._of("embedding_length")
        vocab = self.shape("model.embed_tokens.weight")[0] if "model.embed_tokens.weight" in self else None
        special: Callable[[str], Any] = lambda key: self._value(f"tokenizer.ggml.{key}_token_id", -1)  # noqa: E731
        common = {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": self._of("feed_forward_length"),
            "num_hidden_layers": self._of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._of("attention.head_count_kv", heads),
            "head_dim": self._of("attention.key_length", hidden // heads),
            "rms_norm_eps": _short(self._of("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": self._of("context_length"),
            "tie_word_embeddings": "lm_head.weight" not in self,
            "attention_bias": False,
            **{f"{key}_token_id": special(key) for key in ("bos", "eos") if special(key) >= 0},
        }
        return {**common, **(self._gemma_config(common) if self._architecture == "gemma3" else self._qwen_config())}

    def _rope(self, default_theta: float) -> dict[str, Any]:
        rope = {"rope_theta": float(self._of("rope.freq_base", default_theta)), "rope_type": "default"}
        kind = self._of("rope.scaling.type", "none")
        if kind == "none":
            return rope
        return {**rope, "rope_type": kind, "factor": float(self._of("rope.scaling.factor", 1.0))}

    def _qwen_config(self) -> dict[str, Any]:
        return {"hidden_act": "silu", "rope_parameters": self._rope(10_000.0)}

    def _gemma_config(self, common: dict[str, Any]) -> dict[str, Any]:
        layers = common["num_hidden_layers"]
        per_head = common["hidden_size"] // common["num_attention_heads"]
        local = float(self._of("rope.freq_base_swa", _GEMMA_LOCAL_THETA))
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": per_head if layers == _GEMMA_27B_LAYERS else common["head_dim"],
            "sliding_window": self._of("attention.sliding_window"),
            "layer_types": [SLIDING if (layer + 1) % _GEMMA_PATTERN else FULL for layer in range(layers)],
            "rope_parameters": {
                FULL: self._rope(1_000_000.0),
                SLIDING: {"rope_theta": local, "rope_type": "default"},
            },
        }


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader  # noqa: PLC0415  # heavy, and wanted only with a GGUF file

        return GGUFReader(path)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ModelFileError(f"{path}: not a readable GGUF file: {error}") from error


def _short(value: float) -> float:
    """The shortest decimal that a float32 stands for: 1e-06 for 9.999999974752427e-07."""
    return float(f"{value:.7g}")
