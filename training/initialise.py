"""A drafter to start from: the target's last layers, its final norm, and a draft vocabulary it often uses.

The first projection passes the last captured layer through, so that a draft layer's context keys are at once near
those of the target layer it came from. Leaves training to `training.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark.models.config import FULL, SLIDING, TargetConfig
from dspark.models.drafters import DrafterConfig, DSparkDrafter
from dspark.models.drafters.layers import DraftLayer, RmsNorm
from dspark.models.weights import TensorSource
from training.features import Sequences, Standardisation

_PROBABILITY_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """What is chosen about a drafter; the rest follows from its target."""

    layers: int = 2
    block_size: int = 5
    target_layer_ids: tuple[int, ...] = (1, 6, 11, 16)
    draft_vocab_size: int = 8192
    markov_rank: int = 64
    markov_head_type: str = "vanilla"


def drafter_config(target: TargetConfig, shape: Shape, *, name: str) -> DrafterConfig:
    """The config of a drafter whose layers look like the target's last ones."""
    kinds = target.layer_types[-shape.layers :]
    gemma = target.architecture == "gemma3"
    return DrafterConfig(
        block_size=shape.block_size,
        target_layer_ids=shape.target_layer_ids,
        vocab_size=target.vocab_size,
        draft_vocab_size=shape.draft_vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=shape.layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        num_target_layers=target.num_layers,
        markov_rank=shape.markov_rank,
        markov_head_type=shape.markov_head_type,
        learned_mask=True,
        fc_bias=True,
        embedding_scale=target.hidden_size**0.5 if gemma else 1.0,
        hidden_act="gelu_pytorch_tanh" if gemma else "silu",
        rms_norm_eps=target.rms_norm_eps,
        rope_thetas=tuple(target.rope[kind if kind in (FULL, SLIDING) else FULL].theta for kind in kinds),
        max_position_embeddings=target.max_context,
        name=name,
    )


@torch.no_grad()
def draft_vocabulary(sequences: Sequences, head: Tensor, size: int, *, keep: tuple[int, ...] = ()) -> Tensor:
    """The `d2t` (size,) of the tokens with the highest mean target probability over responses, and those in `keep`."""
    rows = _response_rows(sequences)
    rows = rows[torch.linspace(0, len(rows) - 1, min(_PROBABILITY_ROWS, len(rows))).long()]
    mean = torch.zeros(len(head))
    for piece in torch.split(rows, 64):
        logits = functional.linear(sequences.hidden[piece].to(head.dtype), head).float()
        mean += logits.sub_(sequences.logz[piece][:, None]).exp_().sum(0)
    mean[list(keep)] = torch.inf
    ids = mean.topk(size).indices.sort().values
    return ids - torch.arange(size)


def _response_rows(sequences: Sequences) -> Tensor:
    spans = zip(sequences.starts, sequences.prompt_lengths, sequences.lengths, strict=True)
    return torch.cat([torch.arange(int(start + first), int(start + last)) for start, first, last in spans])


@torch.no_grad()
def start_from_target(
    drafter: DSparkDrafter, source: TensorSource, target: TargetConfig, standardisation: Standardisation
) -> None:
    """Copy the target's last layers and final norm into a drafter that reads standardised states."""
    copy = _Copy(source, target)
    first = target.num_layers - drafter.config.num_layers
    shared = copy.norm(f"layers.{target.num_layers - 1}.input_layernorm")
    for index, layer in enumerate(drafter.layers):
        assert isinstance(layer, DraftLayer)
        copy.layer(layer, f"layers.{first + index}", shared)
    drafter.norm.weight.copy_(copy.norm("norm"))
    drafter.hidden_norm.weight.copy_(shared)
    drafter.fc.weight.zero_()[:, -target.hidden_size :].copy_(standardisation.deviation[-1].diag())
    drafter.fc.bias.copy_(standardisation.mean[-1])
    _start_heads(drafter)


def _start_heads(drafter: DSparkDrafter) -> None:
    """W_1 from the principal components of the output head, W_2 and confidence zero, a mask like a mean embedding."""
    head = drafter.head_weight.float()
    centred = head - head.mean(0)
    _, _, components = torch.pca_lowrank(centred, q=drafter.config.markov_rank, center=False, niter=4)
    projected = centred @ components
    markov = drafter.markov_head
    markov.markov_w1.weight.zero_()[: len(projected)].copy_(projected / projected.square().mean().sqrt())
    markov.markov_w2.weight.zero_()
    if drafter.confidence_head is not None:
        drafter.confidence_head.proj.weight.zero_()
        drafter.confidence_head.proj.bias.zero_()
    if drafter.mask_embedding is not None:
        ids = torch.arange(len(head)) + (0 if drafter.d2t is None else drafter.d2t)
        embeddings = drafter.embed_weight[ids].float() * drafter.config.embedding_scale
        mean = embeddings.mean(0)
        drafter.mask_embedding.copy_(mean * embeddings.square().mean().sqrt() / mean.square().mean().sqrt())


class _Copy:
    """Reads a target's tensors as plain weights (Gemma stores norms without the 1)."""

    def __init__(self, source: TensorSource, target: TargetConfig) -> None:
        self.source = source
        self.target = target
        self.sandwich = target.architecture == "gemma3"

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.get(f"model.{name}.weight", shape, torch.float32)

    def norm(self, name: str, size: int | None = None) -> Tensor:
        return self.get(name, (size or self.target.hidden_size,)) + (1.0 if self.sandwich else 0.0)

    def layer(self, layer: DraftLayer, name: str, shared: Tensor) -> None:
        """One draft layer; `shared` (d,) stands in for its input norm, the difference going into q, k and v."""
        attention = layer.self_attn
        ratio = self.norm(f"{name}.input_layernorm") / torch.where(shared.abs() < 0.05, 0.05, shared)
        for part in ("q_proj", "k_proj", "v_proj"):
            linear: nn.Linear = getattr(attention, part)
            linear.weight.copy_(self.get(f"{name}.self_attn.{part}", tuple(linear.weight.shape)) * ratio)
        for part in ("q_norm", "k_norm"):
            norm: RmsNorm = getattr(attention, part)
            norm.weight.copy_(self.norm(f"{name}.self_attn.{part}", self.target.head_dim))
        layer.input_layernorm.weight.copy_(shared)
        before_mlp = "pre_feedforward_layernorm" if self.sandwich else "post_attention_layernorm"
        layer.post_attention_layernorm.weight.copy_(self.norm(f"{name}.{before_mlp}"))
        attention.o_proj.weight.copy_(self.get(f"{name}.self_attn.o_proj", tuple(attention.o_proj.weight.shape)))
        for part in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, part)
            linear.weight.copy_(self.get(f"{name}.mlp.{part}", tuple(linear.weight.shape)))


@torch.no_grad()
def absorb_post_norms(
    drafter: DSparkDrafter, source: TensorSource, target: TargetConfig, run: Callable[[], object]
) -> None:
    """Scale o_proj and down_proj as Gemma's norms behind them would on the rows that `run()` sends through."""
    if target.architecture != "gemma3":
        return
    copy = _Copy(source, target)
    first = target.num_layers - drafter.config.num_layers
    for index, layer in enumerate(drafter.layers):
        assert isinstance(layer, DraftLayer)
        for linear, norm in (
            (layer.self_attn.o_proj, "post_attention_layernorm"),
            (layer.mlp.down_proj, "post_feedforward_layernorm"),
        ):
            with _output_rms(linear) as seen:
                run()
            linear.weight.mul_((copy.norm(f"layers.{first + index}.{norm}") / seen[-1])[:, None])


@contextmanager
def _output_rms(linear: nn.Linear) -> Iterator[list[float]]:
    seen: list[float] = []
    hook = linear.register_forward_hook(lambda _m, _i, out: seen.append(float(out.float().square().mean().sqrt())))
    try:
        yield seen
    finally:
        hook.remove()


def fold_for_serving(drafter: DSparkDrafter, standardisation: Standardisation) -> DSparkDrafter:
    """A copy that reads raw hidden states: the standardisation goes into W_c and its bias."""
    folded = DSparkDrafter(
        replace(drafter.config, normalize_inputs=True),
        embed_weight=drafter.embed_weight,
        head_weight=drafter.head_weight,
        d2t=drafter.d2t,
    )
    folded.load_state_dict(drafter.state_dict())
    with torch.no_grad():
        weight, bias = standardisation.fold(drafter.fc.weight, drafter.fc.bias)
        folded.fc.weight.copy_(weight)
        folded.fc.bias.copy_(bias)
    return folded
