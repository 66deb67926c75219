"""Target models: loading one from a Hugging Face directory or a GGUF file, and running it over a ragged batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional

from dspark.errors import ModelFileError
from dspark.kernels import Kernels, Plan
from dspark.kernels.linear import Linear, LinearInto
from dspark.messages import ModelInfo
from dspark.models import gemma3, qwen3
from dspark.models.batch import RaggedBatch
from dspark.models.config import SLIDING, TargetConfig, parse_config, read_config, read_json
from dspark.models.fingerprint import model_fingerprint, numerics_fingerprint
from dspark.models.gguf import GgufSource
from dspark.models.kv_cache import KVCache
from dspark.models.layers import GroupStep, LayerWeights, RotaryTable
from dspark.models.mapped import let_go_of, read_ahead
from dspark.models.weights import SafetensorsSource, TensorSource

EMBEDDING = -1
"""The layer id that stands for the embedding's output."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward gives: `hidden` (rows, d) after the final norm, and the captured layers' outputs (rows, d)."""

    hidden: torch.Tensor
    captured: dict[int, torch.Tensor]


class DecoderLayer(Protocol):
    """One decoder layer. `first_norm` is the weight of the RMSNorm in front of it."""

    first_norm: torch.Tensor

    def __call__(
        self, x: torch.Tensor, normed: torch.Tensor, step: GroupStep, storage: torch.Tensor, following: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream (rows, d) and its norm ↦ the same after this layer, with `following` as the norm's weight.

        Writes the rows' keys and values into `storage`.
        """


@dataclass(frozen=True, slots=True)
class _Architecture:
    layer: type[gemma3.Gemma3Layer | qwen3.Qwen3Layer]
    norm_offset: float
    scaled_embedding: bool


_ARCHITECTURES = {
    "gemma3": _Architecture(gemma3.Gemma3Layer, gemma3.NORM_OFFSET, scaled_embedding=True),
    "qwen3": _Architecture(qwen3.Qwen3Layer, qwen3.NORM_OFFSET, scaled_embedding=False),
}


class TargetModel:
    """A target model, ready to run.

    `embed_weight` (vocab, d) is the model's own. On a CPU it stays mapped from a bfloat16 file, so that only the rows
    looked up take memory, and the head's product uses a packed copy: with a `screen`, once whole logits are wanted.
    """

    def __init__(
        self,
        config: TargetConfig,
        info: ModelInfo,
        source: TensorSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        architecture = _ARCHITECTURES[config.architecture]
        self.config, self.info, self.dtype, self.device, self.kernels = config, info, dtype, device, kernels
        shape = config.vocab_size, config.hidden_size
        self.embed_weight = source.lookup("model.embed_tokens.weight", shape, dtype).to(device)
        tied = config.tie_word_embeddings
        self._stored_head = self.embed_weight if tied else source.lookup("lm_head.weight", shape, dtype).to(device)
        self.screen = kernels.screen(self._stored_head)
        if self.screen is None:
            self._head = kernels.linear(self._stored_head.to(dtype))
        scaled = architecture.scaled_embedding
        self._embedding_scale = gemma3.embedding_scale(config.hidden_size, dtype) if scaled else None
        self.layers: list[DecoderLayer] = [
            architecture.layer(
                LayerWeights(source, layer, config, dtype, device, offset=architecture.norm_offset), kernels
            )
            for layer in range(config.num_layers)
        ]
        norm = source.get("model.norm.weight", (config.hidden_size,), torch.float32)
        self.norm_weight = (norm + architecture.norm_offset).to(device)
        self._repeat = kernels.repeated()
        self._rotary = {kind: RotaryTable(config.rope[kind], config.head_dim, device) for kind in config.layer_types}

    @cached_property
    def _head(self) -> Linear:
        """The head's product where there is a screen: laid out when logits are first asked for."""
        assert self.screen is not None
        read_ahead(self._stored_head)
        whole = self.screen.whole()
        let_go_of(self._stored_head)
        return whole

    @property
    def remembers(self) -> bool:
        """Whether a batch of so many rows takes longer when the first of its kind comes."""
        return self._repeat.remembers

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of the keys and values that these layers write and read."""
        return self.kernels.kept or self.dtype

    @cached_property
    def head_weight(self) -> torch.Tensor:
        """The output head (vocab, d) in the model's dtype, unpacked; serving does not need it."""
        return self._stored_head.to(self.dtype)

    def embed_tokens(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (...,) ↦ what the first layer sees (..., d): scaled, where the architecture scales it."""
        embedded = functional.embedding(token_ids, self.embed_weight).to(self.dtype)
        return embedded if self._embedding_scale is None else embedded * self._embedding_scale

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, cache: KVCache, *, capture: frozenset[int] = frozenset()) -> Forward:
        """Run all layers over a batch and write its keys and values into the cache.

        Layer id l in `capture` is the output of decoder layer l (0-based, the residual stream), -1 the embedding's.
        The cache is one of `kept_dtype`: in another, layers would compute other numbers than their fingerprint says.
        """
        assert cache.dtype == self.kept_dtype
        x, wanted = self.embed_tokens(batch.token_ids), sorted(capture)
        hidden, *captured = self._repeat(
            partial(self._layers, cache=cache, capture=wanted), x, self._steps(batch), (cache.identity, *wanted)
        )
        return Forward(hidden, dict(zip(wanted, captured, strict=True)))

    def _layers(
        self, x: torch.Tensor, steps: Mapping[str, GroupStep], *, cache: KVCache, capture: Sequence[int]
    ) -> list[torch.Tensor]:
        """Rows after the final norm, and the outputs of the layers `capture`."""
        norms = [*(layer.first_norm for layer in self.layers), self.norm_weight]
        normed, captured = self.kernels.rms_norm(x, norms[0], self.config.rms_norm_eps), {EMBEDDING: x}
        for index, layer in enumerate(self.layers):
            x, normed = layer(x, normed, steps[self.config.layer_types[index]], cache.layer(index), norms[index + 1])
            if index in capture:
                captured[index] = x
        return [normed, *(captured[layer] for layer in capture)]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden rows (n, d) after the final norm ↦ logits (n, vocab) in the model's dtype.

        `out` (n, written_logits): memory for them, which they are a view of then.
        """
        if out is None:
            return self._head(hidden)
        assert isinstance(self._head, LinearInto)
        return self._head.into(hidden, out)

    @property
    def written_logits(self) -> int:
        """Numbers of a row that `logits` writes where it is told; 0 if it does not."""
        if self.screen is not None:
            return self.screen.width
        return self._head.width if isinstance(self._head, LinearInto) else 0

    def _steps(self, batch: RaggedBatch) -> dict[str, GroupStep]:
        return {
            kind: GroupStep(*self._rotary[kind](batch.positions, batch.length), plan=self._plan(batch, kind))
            for kind in self._rotary
        }

    def _plan(self, batch: RaggedBatch, kind: str) -> Plan:
        config = self.config
        return self.kernels.plan_attention(
            batch.spans[kind],
            page_size=batch.page_size,
            window=config.sliding_window if kind == SLIDING else None,
            group=config.num_heads // config.num_kv_heads,
            dtype=self.dtype,
            device=self.device,
        )


def load_target(path: Path, *, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> TargetModel:
    """Load a Hugging Face directory (config.json, safetensors) or a .gguf file.

    ModelFileError with one readable line for whatever is missing, broken or of unexpected shape.
    """
    with _opened(path) as (config, source):
        info = _info(path, config, dtype, device, kernels)
        return TargetModel(config, info, source, dtype=dtype, device=device, kernels=kernels)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[TargetConfig, TensorSource]]:
    if path.is_file():
        gguf = GgufSource(path)
        yield parse_config(gguf.config, source=str(path)), gguf
    elif path.is_dir():
        config = read_config(path)
        with SafetensorsSource(path) as source:
            yield config, source
    else:
        raise ModelFileError(f"{path}: no such model directory or GGUF file")


def _info(path: Path, config: TargetConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels) -> ModelInfo:
    return ModelInfo(
        name=path.resolve().stem if path.is_file() else path.resolve().name,
        architecture=config.architecture,
        model_fingerprint=model_fingerprint(path),
        numerics_fingerprint=numerics_fingerprint(dtype, kernels, device),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        max_context=config.max_context,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        has_chat_template=_has_chat_template(path),
    )


def _has_chat_template(path: Path) -> bool:
    if path.is_file():
        return False
    if (path / "chat_template.jinja").exists():
        return True
    settings = path / "tokenizer_config.json"
    return settings.exists() and bool(read_json(settings).get("chat_template"))
