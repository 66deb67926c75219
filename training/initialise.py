"""A drafter to start from: the target's last layers, its final norm, and a draft vocabulary it often uses.

The first projection passes the last captured layer through, so that a draft layer's context keys are at once near
those of the target layer it came from. Leaves training to `training.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from dspark.errors import ConfigError
from dspark.models.config import FULL, SLIDING, TargetConfig
from dspark.models.drafters import ChainDrafter, Drafter, DrafterConfig, DSparkDrafter, ParallelDrafter
from dspark.models.drafters.layers import DraftLayer, RmsNorm
from dspark.models.weights import TensorSource
from training.states import Batch, TargetStates

_EMBEDDED = 0.5  # weight of the token beside the feature in a chain drafter's first rows
_ROWS = 128  # of logits at a time


@dataclass(frozen=True, slots=True)
class Shape:
    """What is chosen about a drafter; the rest follows from its target. `draft_vocab_size` 0 is all of its tokens.

    With a `plain_tap`, W_c has no bias and reads hidden states as they are, and masks are row 0 of the embedding, as in
    the published checkpoints. Else captured layers are normalised and standardised, and the mask is learned.
    `hint_lengths`: how many ids of the text's end are looked up in it; none for a drafter without hints.
    """

    architecture: str = "dspark"
    layers: int = 2
    block_size: int = 7
    target_layer_ids: tuple[int, ...] = ()
    draft_vocab_size: int = 8192
    markov_rank: int = 64
    markov_head_type: str = "vanilla"
    plain_tap: bool = False
    hint_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Mean and deviation (m, d) of root-mean-square-normalised hidden states, one row a captured layer."""

    mean: Tensor
    deviation: Tensor

    def to(self, device: torch.device) -> Standardisation:
        """The same on another device."""
        return Standardisation(self.mean.to(device), self.deviation.to(device))

    def apply_(self, captured: Tensor) -> None:
        """Standardise (…, m, d) in place."""
        captured.copy_((captured.float() - self.mean) / self.deviation)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """W_c and bias that give on normalised states what `weight` and `bias` give on standardised ones."""
        folded = weight / self.deviation.flatten()
        shift = -(folded @ self.mean.flatten())
        return folded, shift if bias is None else bias + shift

    def unfold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The opposite of `fold`."""
        shift = weight @ self.mean.flatten()
        return weight * self.deviation.flatten(), shift if bias is None else bias + shift


def spread_layers(num_layers: int, count: int = 4) -> tuple[int, ...]:
    """`count` feature layers from the second to the last but one, evenly spread; never the last (DSpark §3.1)."""
    first, last = min(1, num_layers - 2), num_layers - 2
    count = min(count, last - first + 1)
    return tuple(round(first + (last - first) * n / max(count - 1, 1)) for n in range(count))


def drafter_config(target: TargetConfig, shape: Shape, *, name: str) -> DrafterConfig:
    """The config of a drafter whose layers look like the target's last ones."""
    if shape.layers > target.num_layers:
        raise ConfigError(f"{shape.layers} draft layers are more than the target's {target.num_layers}")
    layer_ids = shape.target_layer_ids or spread_layers(target.num_layers)
    last = target.num_layers - 2
    if len(set(layer_ids)) < len(layer_ids) or not all(-1 <= layer <= last for layer in layer_ids):
        raise ConfigError(f"feature layers {list(layer_ids)}: each once, from -1 (the embedding) to {last}")
    kinds = target.layer_types[-shape.layers :]
    vocabulary = min(shape.draft_vocab_size or target.vocab_size, target.vocab_size)
    heads = shape.architecture == "dspark"
    gemma = target.architecture == "gemma3"
    return DrafterConfig(
        block_size=shape.block_size,
        target_layer_ids=layer_ids,
        vocab_size=target.vocab_size,
        draft_vocab_size=vocabulary,
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_layers=shape.layers,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        num_target_layers=target.num_layers,
        markov_rank=shape.markov_rank if heads else 0,
        markov_head_type=shape.markov_head_type,
        confidence_head=heads,
        learned_mask=shape.architecture in ("dspark", "dflash") and not shape.plain_tap,
        fc_bias=not shape.plain_tap,
        embedding_scale=target.hidden_size**0.5 if gemma else 1.0,
        hidden_act="gelu_pytorch_tanh" if gemma else "silu",
        rms_norm_eps=target.rms_norm_eps,
        rope_thetas=tuple(target.rope[kind if kind in (FULL, SLIDING) else FULL].theta for kind in kinds),
        max_position_embeddings=target.max_context,
        hint_lengths=shape.hint_lengths if heads else (),
        name=name,
        architecture=shape.architecture,
    )


def sample_batch(states: TargetStates, rows: Sequence[int], count: int) -> Batch:
    """Some texts, evenly spread."""
    return states.batch(spread(rows, count))


def spread(rows: Sequence[int], count: int) -> list[int]:
    """So many of the rows, evenly spread; all where there are no more."""
    return [rows[int(n)] for n in torch.linspace(0, len(rows) - 1, min(count, len(rows)), dtype=torch.float64)]


def as_it_is(captured: Tensor) -> Standardisation:
    """What changes nothing about (…, m, d)."""
    shape = captured.shape[-2:]
    return Standardisation(torch.zeros(shape), torch.ones(shape))


def measure(captured: Tensor, lengths: Tensor) -> Standardisation:
    """Mean and deviation over the texts' own rows of (s, t, m, d)."""
    real = torch.arange(captured.shape[1], device=lengths.device) < lengths[:, None]
    rows = captured[real].float()
    return Standardisation(rows.mean(0), rows.std(0).clamp_min(1e-3))


@torch.no_grad()
def draft_vocabulary(batches: Iterable[Batch], head: Tensor, size: int, *, keep: tuple[int, ...] = ()) -> Tensor:
    """The `d2t` (size,) of the tokens with the highest mean target probability over responses, and those in `keep`."""
    mean = torch.zeros(len(head), device=head.device)
    for batch in batches:
        places = torch.arange(batch.token_ids.shape[1], device=batch.lengths.device)
        real = (places >= batch.prompt_lengths[:, None]) & (places < batch.lengths[:, None])
        rows = zip(torch.split(batch.hidden[real], _ROWS), torch.split(batch.logz[real], _ROWS), strict=True)
        for hidden, logz in rows:
            logits = functional.linear(hidden.to(head.dtype), head).float()
            mean += logits.sub_(logz[:, None]).exp_().sum(0)
    mean[list(keep)] = torch.inf
    ids = mean.topk(size).indices.sort().values
    return ids - torch.arange(size, device=ids.device)


@torch.no_grad()
def start_from_target(
    drafter: Drafter, source: TensorSource, target: TargetConfig, standardisation: Standardisation
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
    if drafter.config.fc_bias:
        drafter.fc.bias.copy_(standardisation.mean[-1])
    if isinstance(drafter, DSparkDrafter):
        _start_heads(drafter)
    if isinstance(drafter, ParallelDrafter) and drafter.mask_embedding is not None:
        _start_mask(drafter, drafter.mask_embedding)
    if isinstance(drafter, ChainDrafter):
        identity = torch.eye(target.hidden_size)
        drafter.in_proj.weight.copy_(torch.cat([_EMBEDDED * identity, identity], 1))


def _start_heads(drafter: DSparkDrafter) -> None:
    """W_1 from the principal components of the output head, W_2 and confidence zero."""
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


def _start_mask(drafter: Drafter, mask: Tensor) -> None:
    """A mask like the mean embedding of the draft vocabulary, as long as one of them."""
    ids = torch.arange(len(drafter.head_weight), device=drafter.head_weight.device) + (
        0 if drafter.d2t is None else drafter.d2t
    )
    embeddings = drafter.embed(ids).float()
    mean = embeddings.mean(0)
    mask.copy_(mean * embeddings.square().mean().sqrt() / mean.square().mean().sqrt())


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
def absorb_post_norms(drafter: Drafter, source: TensorSource, target: TargetConfig, run: Callable[[], object]) -> None:
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
            scale = copy.norm(f"layers.{first + index}.{norm}") / seen[-1]
            linear.weight.mul_(scale.to(linear.weight.device)[:, None])


@contextmanager
def _output_rms(linear: nn.Linear) -> Iterator[list[float]]:
    seen: list[float] = []
    hook = linear.register_forward_hook(lambda _m, _i, out: seen.append(float(out.float().square().mean().sqrt())))
    try:
        yield seen
    finally:
        hook.remove()


def fold_for_serving(drafter: Drafter, standardisation: Standardisation) -> Drafter:
    """A drafter that reads raw hidden states: a copy with the standardisation in W_c and its bias.

    One with a plain tap reads them anyhow.
    """
    if not drafter.config.fc_bias:
        return drafter
    folded = type(drafter)(
        replace(drafter.config, normalize_inputs=True),
        embed_weight=drafter.embed_weight,
        head_weight=drafter.head_weight,
        d2t=drafter.d2t,
    ).to(drafter.fc.weight.device)
    folded.load_state_dict(drafter.state_dict())
    with torch.no_grad():
        weight, bias = standardisation.fold(drafter.fc.weight, drafter.fc.bias)
        folded.fc.weight.copy_(weight)
        folded.fc.bias.copy_(bias)
    return folded
