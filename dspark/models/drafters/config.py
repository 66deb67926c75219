"""What a drafter checkpoint's config.json says: the published DeepSpec fields and this project's additions.

A published config.json is the target's config with a few more fields; every addition of ours has a default that means
"as published". Leaves tensors to `checkpoint` and the arithmetic to `dspark`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark.errors import ModelFileError
from dspark.models.drafters.calibration import Calibration, calibrations_to_json, parse_calibrations

ARCHITECTURES = {
    "Qwen3DSparkModel": "dspark",
    "DSparkModel": "dspark",
    "DFlashModel": "dflash",
    "Eagle3Model": "eagle3",
    "MtpModel": "mtp",
}
PUBLISHED = "Qwen3DSparkModel"
HEAD_TYPES = ("vanilla", "gated", "rnn")
MOST_HINTED = 64
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Shapes and constants of a drafter.

    `architecture` is "dspark", "dflash", "eagle3" or "mtp"; all but the first have no sequential and no confidence head
    (`markov_rank` 0). `block_size` is the most tokens drafted a round.

    `hidden_size` is the width of the target, of the features and of the draft layers alike. Additions to the published
    format: a draft vocabulary (`draft_vocab_size` < `vocab_size`; W_1 then has one more row, for all other tokens), a
    learned mask embedding instead of row `mask_token_id`, `fc_bias`, `normalize_inputs` (each captured layer is divided
    by its root mean square before W_c), `embedding_scale` (Gemma multiplies embeddings), one rotary base a layer, and
    `hint_lengths`: how many ids of the text's end are looked up in it, shortest first, for `hints`; none without; and
    `cut_lengths`: numbers of tokens below `block_size` that it was trained to draft in a shorter block.
    """

    block_size: int
    target_layer_ids: tuple[int, ...]
    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_target_layers: int
    markov_rank: int
    markov_head_type: str = "vanilla"
    confidence_head: bool = True
    confidence_with_markov: bool = True
    mask_token_id: int = 0
    learned_mask: bool = False
    fc_bias: bool = False
    normalize_inputs: bool = False
    embedding_scale: float = 1.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_thetas: tuple[float, ...] = ()
    max_position_embeddings: int = 32_768
    hint_lengths: tuple[int, ...] = ()
    cut_lengths: tuple[int, ...] = ()
    name: str = ""
    model_fingerprint: str = ""
    architecture: str = "dspark"
    calibration: tuple[Calibration, ...] = ()

    @property
    def reduced_vocabulary(self) -> bool:
        """Whether the drafter proposes only some of the target's tokens."""
        return self.draft_vocab_size < self.vocab_size

    def cut(self, count: int) -> int:
        """Tokens of the shortest block that it was trained to draft `count` in."""
        return min((length for length in self.cut_lengths if length >= count), default=self.block_size)

    @property
    def markov_rows(self) -> int:
        """Rows of W_1: the draft vocabulary, and one for all other tokens where there are any."""
        return self.draft_vocab_size + self.reduced_vocabulary


def parse_drafter_config(config: Mapping[str, Any], *, source: str) -> DrafterConfig:
    """A config.json's contents, checked; ModelFileError names `source` and the field at fault."""
    read = _Fields(config, source)
    architecture = read.architecture()
    layers, block_size = read.count("num_hidden_layers"), read.count("block_size")
    heads = architecture == "dspark"
    vocab_size = read.count("vocab_size")
    parsed = DrafterConfig(
        block_size=block_size,
        target_layer_ids=read.layer_ids(),
        vocab_size=vocab_size,
        draft_vocab_size=read.count("draft_vocab_size", vocab_size),
        hidden_size=read.count("hidden_size"),
        intermediate_size=read.count("intermediate_size"),
        num_layers=layers,
        num_heads=read.count("num_attention_heads"),
        num_kv_heads=read.count("num_key_value_heads"),
        head_dim=read.count("head_dim"),
        num_target_layers=read.count("num_target_layers"),
        markov_rank=read.count("markov_rank") if heads else 0,
        markov_head_type=read.choice("markov_head_type", HEAD_TYPES),
        confidence_head=heads and bool(config.get("enable_confidence_head", True)),
        confidence_with_markov=bool(config.get("confidence_head_with_markov", True)),
        mask_token_id=read.integer("mask_token_id", 0),
        learned_mask=bool(config.get("learned_mask_embedding", False)),
        fc_bias=bool(config.get("fc_bias", False)),
        normalize_inputs=bool(config.get("normalize_inputs", False)),
        embedding_scale=read.positive("embedding_scale", 1.0),
        hidden_act=read.choice("hidden_act", ACTIVATIONS),
        rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
        rope_thetas=read.rope_thetas(layers),
        max_position_embeddings=read.count("max_position_embeddings", 32_768),
        hint_lengths=read.lengths("hint_lengths", MOST_HINTED) if heads else (),
        cut_lengths=read.lengths("cut_lengths", block_size - 1),
        name=str(config.get("name", "")),
        model_fingerprint=str(config.get("target_model_fingerprint", "")),
        architecture=architecture,
        calibration=parse_calibrations(config.get("calibration"), block_size, source),
    )
    read.refuse_unsupported(parsed)
    return parsed


def to_json(config: DrafterConfig) -> dict[str, Any]:
    """The config.json that `parse_drafter_config` reads back."""
    return {
        "architectures": [_class_name(config)],
        "model_type": "qwen3",
        "name": config.name,
        "target_model_fingerprint": config.model_fingerprint,
        "block_size": config.block_size,
        "target_layer_ids": list(config.target_layer_ids),
        "num_target_layers": config.num_target_layers,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_thetas": list(config.rope_thetas),
        "sliding_window": None,
        "max_position_embeddings": config.max_position_embeddings,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_with_markov,
        "mask_token_id": config.mask_token_id,
        "learned_mask_embedding": config.learned_mask,
        "fc_bias": config.fc_bias,
        "normalize_inputs": config.normalize_inputs,
        "embedding_scale": config.embedding_scale,
        **({"hint_lengths": list(config.hint_lengths)} if config.hint_lengths else {}),
        **({"cut_lengths": list(config.cut_lengths)} if config.cut_lengths else {}),
        "dtype": "bfloat16",
        **({"calibration": calibrations_to_json(config.calibration)} if config.calibration else {}),
    }


def _class_name(config: DrafterConfig) -> str:
    ours = config.reduced_vocabulary or config.learned_mask or config.hint_lengths
    if config.architecture == "dspark" and not ours:
        return PUBLISHED
    return next(name for name, known in ARCHITECTURES.items() if known == config.architecture and name != PUBLISHED)


class _Fields:
    """Reads fields of one config and complains in one voice."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def architecture(self) -> str:
        named = self.config.get("architectures")
        known = [ARCHITECTURES[name] for name in named if name in ARCHITECTURES] if isinstance(named, list) else []
        if not known:
            raise self.error(f"architectures {named!r} names no known drafter ({', '.join(ARCHITECTURES)})")
        return known[0]

    def error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {message}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self.error(f"{key} must be a positive integer, not {value!r}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"{key} must be a non-negative integer, not {value!r}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(f"{key} must be a positive number, not {value!r}")
        return float(value)

    def choice(self, key: str, known: tuple[str, ...]) -> str:
        value = self.config.get(key, known[0])
        if value not in known:
            raise self.error(f"{key} {value!r} is not supported (known: {', '.join(known)})")
        return str(value)

    def layer_ids(self) -> tuple[int, ...]:
        ids = self.config.get("target_layer_ids")
        last = self.count("num_target_layers") - 2
        if not isinstance(ids, list) or not ids or not all(type(i) is int and -1 <= i <= last for i in ids):
            raise self.error(f"target_layer_ids must list layers from -1 to {last}, not {ids!r}")
        return tuple(ids)

    def lengths(self, key: str, most: int) -> tuple[int, ...]:
        given = self.config.get(key, [])
        counts = isinstance(given, list) and all(type(n) is int and 1 <= n <= most for n in given)
        if not counts or list(given) != sorted(set(given)):
            raise self.error(f"{key} must list numbers from 1 to {most} in ascending order, not {given!r}")
        return tuple(given)

    def rope_thetas(self, layers: int) -> tuple[float, ...]:
        given = self.config.get("rope_thetas")
        if given is not None:
            if not isinstance(given, list) or len(given) != layers or not all(self._is_theta(t) for t in given):
                raise self.error(f"rope_thetas must list {layers} positive numbers, not {given!r}")
            return tuple(float(theta) for theta in given)
        parameters = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if parameters.get("rope_type", "default") != "default":
            raise self.error(f"rope_type {parameters['rope_type']!r} is not supported")
        theta = parameters.get("rope_theta", self.config.get("rope_theta", 10_000.0))
        if not self._is_theta(theta):
            raise self.error(f"rope_theta must be a positive number, not {theta!r}")
        return (float(theta),) * layers

    @staticmethod
    def _is_theta(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    def refuse_unsupported(self, parsed: DrafterConfig) -> None:
        if self.config.get("sliding_window") is not None and self.config.get("use_sliding_window", True):
            raise self.error("sliding-window draft layers are not supported")
        if self.config.get("attention_bias"):
            raise self.error("attention_bias is not supported")
        if parsed.num_heads % parsed.num_kv_heads or parsed.head_dim % 2:
            heads = f"{parsed.num_heads} heads, {parsed.num_kv_heads} key/value heads, head_dim {parsed.head_dim}"
            raise self.error(f"{heads} do not fit together")
        if parsed.draft_vocab_size > parsed.vocab_size or parsed.mask_token_id >= parsed.vocab_size:
            raise self.error(
                f"draft_vocab_size {parsed.draft_vocab_size} and mask_token_id {parsed.mask_token_id} must lie within "
                f"vocab_size {parsed.vocab_size}"
            )
