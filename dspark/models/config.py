"""What a target model's config.json says, checked: architecture, shapes, rotary embedding and layer kinds.

Knows the present transformers layout (`rope_parameters`) and the older one (`rope_theta`, `rope_scaling`,
`rope_local_base_freq`). Leaves weights to `dspark.models.weights` and the arithmetic to the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import ModelFileError

FULL = "full_attention"
SLIDING = "sliding_attention"

_GEMMA3 = "gemma3"
_QWEN3 = "qwen3"
_MODEL_TYPES = {"gemma3_text": _GEMMA3, "gemma3": _GEMMA3, "qwen3": _QWEN3}
_ACTIVATIONS = {_GEMMA3: ("gelu_pytorch_tanh",), _QWEN3: ("silu",)}
_DEFAULTS: dict[str, dict[str, Any]] = {
    _GEMMA3: {"head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "tie_word_embeddings": True,
              "bos_token_id": 2, "eos_token_id": 1, "sliding_window": 4096},
    _QWEN3: {"head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one layer kind: angle of pair i at position p is p / (factor · theta^(2i / head_dim))."""

    theta: float
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """Shapes and constants of a target model.

    `layer_types[l]` is `FULL` or `SLIDING`; a sliding layer at position p sees positions p - sliding_window + 1 … p.
    `attention_scale` multiplies query-key products. `max_context` counts tokens.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: Mapping[str, RopeConfig]
    sliding_window: int | None
    layer_types: tuple[str, ...]
    attention_scale: float
    tie_word_embeddings: bool
    max_context: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_config(directory: Path) -> TargetConfig:
    """The checked config of a Hugging Face directory; ModelFileError names the file and the field at fault.

    End-of-sequence ids of generation_config.json come first, for it lists them all where config.json names one.
    """
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        config = {**config, **({} if eos is None else {"eos_token_id": eos})}
    return parse_config(config, source=str(directory / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ModelFileError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def parse_config(config: Mapping[str, Any], *, source: str) -> TargetConfig:
    """A config.json's contents, checked; `source` names it in errors."""
    return _Reader(config, source).target()


class _Reader:
    """Reads fields of one config and complains in one voice."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.source = source
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise self.error(f"model_type {model_type!r} is not supported (known: {', '.join(sorted(_MODEL_TYPES))})")
        if model_type == "gemma3" and isinstance(config.get("text_config"), Mapping):
            config = {**config["text_config"], **{k: config[k] for k in ("eos_token_id",) if k in config}}
        self.architecture = _MODEL_TYPES[model_type]
        self.config = {**_DEFAULTS[self.architecture], **config}

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {message}")

    def target(self) -> TargetConfig:
        self._refuse_unsupported()
        heads, kv_heads, head_dim = (self._count(k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        if heads % kv_heads or head_dim % 2:
            raise self.error(f"{heads} attention heads, {kv_heads} key/value heads, head_dim {head_dim} do not fit")
        layer_types = self._layer_types(self._count("num_hidden_layers"))
        return TargetConfig(
            architecture=self.architecture,
            vocab_size=self._count("vocab_size"),
            hidden_size=self._count("hidden_size"),
            num_layers=len(layer_types),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self._count("intermediate_size"),
            rms_norm_eps=self._positive("rms_norm_eps"),
            rope=self._rope(),
            sliding_window=self._count("sliding_window") if SLIDING in layer_types else None,
            layer_types=layer_types,
            attention_scale=self._attention_scale(head_dim),
            tie_word_embeddings=bool(self.config["tie_word_embeddings"]),
            max_context=self._count("max_position_embeddings"),
            eos_token_ids=self._token_ids("eos_token_id"),
            bos_token_id=next(iter(self._token_ids("bos_token_id")), None),
        )

    def _refuse_unsupported(self) -> None:
        for key in (
            "attention_bias",
            "use_bidirectional_attention",
            "final_logit_softcapping",
            "attn_logit_softcapping",
        ):
            if self.config.get(key):
                raise self.error(f"{key} = {self.config[key]!r} is not supported")
        if self.config.get("quantization_config"):
            raise self.error("quantised weights are not supported")
        activation = self.config.get("hidden_activation") or self.config.get("hidden_act")
        if activation not in (None, *_ACTIVATIONS[self.architecture]):
            raise self.error(f"activation {activation!r} is not supported")

    def _count(self, key: str) -> int:
        value = self.config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key} must be a positive integer, not {value!r}")
        return value

    def _positive(self, key: str) -> float:
        return self._number(self.config.get(key), key)

    def _number(self, value: Any, key: str) -> float:
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.error(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def _token_ids(self, key: str) -> tuple[int, ...]:
        value = self.config.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            raise self.error(f"{key} must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def _attention_scale(self, head_dim: int) -> float:
        if self.architecture == _GEMMA3 and self.config.get("query_pre_attn_scalar") is not None:
            return 1.0 / math.sqrt(self._positive("query_pre_attn_scalar"))
        return 1.0 / math.sqrt(head_dim)

    def _layer_types(self, layers: int) -> tuple[str, ...]:
        given = self.config.get("layer_types")
        if given is None:
            given = [self._default_layer_type(layer) for layer in range(layers)]
        if len(given) != layers or not set(given) <= {FULL, SLIDING}:
            raise self.error(f"layer_types must name {layers} layers as {FULL} or {SLIDING}")
        return tuple(given)

    def _default_layer_type(self, layer: int) -> str:
        if self.architecture == _GEMMA3:
            pattern = self.config.get("sliding_window_pattern") or self.config.get("_sliding_window_pattern") or 6
            return SLIDING if (layer + 1) % pattern else FULL
        slides = self.config.get("use_sliding_window") and layer >= self.config.get("max_window_layers", 0)
        return SLIDING if slides else FULL

    def _rope(self) -> Mapping[str, RopeConfig]:
        given = self.config.get("rope_parameters")
        if given and FULL in given:
            return {kind: self._rope_of(given[kind], kind) for kind in (FULL, SLIDING) if given.get(kind)}
        if given:
            shared = self._rope_of(given, "rope_parameters")
            return {FULL: shared, SLIDING: shared}
        return self._old_rope()

    def _old_rope(self) -> Mapping[str, RopeConfig]:
        gemma = self.architecture == _GEMMA3
        theta = self.config.get("rope_theta", 1_000_000.0 if gemma else 10_000.0)
        full = self._rope_of({"rope_theta": theta, **(self.config.get("rope_scaling") or {})}, "rope_theta")
        local = self.config.get("rope_local_base_freq", 10_000.0)
        return {FULL: full, SLIDING: self._rope_of({"rope_theta": local}, "rope_local_base_freq") if gemma else full}

    def _rope_of(self, parameters: Mapping[str, Any], key: str) -> RopeConfig:
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in ("default", "linear"):
            raise self.error(f"rope type {kind!r} is not supported (known: default, linear)")
        if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.error("partial_rotary_factor is not supported")
        factor = self._number(parameters.get("factor"), f"{key}.factor") if kind == "linear" else 1.0
        return RopeConfig(theta=self._number(parameters.get("rope_theta"), f"{key}.rope_theta"), factor=factor)
