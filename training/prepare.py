"""Everything that a run needs before its first step: the target's states and a drafter at its start.

The first process decides what the run keeps to (draft vocabulary, standardisation) and the others read it.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dspark.devices import pick_dtype, pick_numerics
from dspark.errors import ConfigError, Mismatch
from dspark.models.config import TargetConfig, parse_config, read_config
from dspark.models.drafters import CLASSES, Drafter, DrafterConfig, ParallelDrafter
from dspark.models.drafters.checkpoint import target_tensors
from dspark.models.gguf import GgufSource
from dspark.models.target import load_target
from dspark.models.weights import SafetensorsSource, TensorSource
from training.beginning import begin_with, beginning_of
from training.blocks import arithmetic_of, block_rows, sample_anchors
from training.dataset import Manifest, Texts
from training.initialise import (
    Standardisation,
    absorb_post_norms,
    as_it_is,
    draft_vocabulary,
    drafter_config,
    measure,
    sample_batch,
    spread,
    start_from_target,
)
from training.plan import RunPlan
from training.state import SETUP_FILE, load_setup, save_setup
from training.state_cache import StateCache, StateCaches, States
from training.state_memory import StateMemory
from training.states import Hinted, TargetStates
from training.trainer import Exchange

__all__ = ["open_target", "prepare", "split", "target_states", "with_blocks"]

HELD_OUT_EVERY = 40
VALIDATED = 64
SETUP_TEXTS = 96
VOCABULARY_TEXTS = {"cpu": 192, "cuda": 4096}  # the rarer a token, the more of them it takes to know it


def split(count: int) -> tuple[list[int], list[int]]:
    """Training and held-out texts; a small data set holds out its last."""
    held_out = [n for n in range(count) if n % HELD_OUT_EVERY == HELD_OUT_EVERY - 1] or [count - 1]
    training = sorted(set(range(count)) - set(held_out))
    if not training:
        raise ConfigError("a data set needs at least two responses")
    return training, held_out[:VALIDATED]


def with_blocks(rows: Sequence[int], texts: Texts) -> list[int]:
    """Those of the rows whose response has a block to predict: an anchor and a token behind it."""
    return [row for row in rows if len(texts.token_ids[row]) - texts.prompt_lengths[row] >= 2]


@contextlib.contextmanager
def open_target(path: Path) -> Iterator[tuple[TensorSource, TargetConfig]]:
    """A target's tensors and config, from a Hugging Face directory or a .gguf file."""
    if path.is_file():
        gguf = GgufSource(path)
        yield gguf, parse_config(gguf.config, source=str(path))
        return
    with SafetensorsSource(path) as source:
        yield source, read_config(path)


def target_states(plan: RunPlan, manifests: Sequence[Manifest], texts: Sequence[Texts]) -> TargetStates:
    """The states of the data sets' texts, one after the other; `Mismatch` where another model wrote any."""
    device = torch.device(plan.device)
    own, dtype = pick_numerics("auto", "auto", device), pick_dtype("auto", device)
    target = load_target(plan.target, dtype=own.dtype, device=device, kernels=own.kernels)
    for path, manifest in zip(plan.data, manifests, strict=True):
        if target.info.model_fingerprint != manifest.model_fingerprint:
            raise Mismatch(
                f"{path} was written by {manifest.target} ({manifest.model_fingerprint[:12]}), "
                f"not by this {target.info.name} ({target.info.model_fingerprint[:12]})"
            )
    config = drafter_config(target.config, plan.shape, name=plan.name)
    layers = config.target_layer_ids
    joined = functools.reduce(operator.add, texts)
    hinted = Hinted(config.hint_lengths, config.block_size) if config.hint_lengths else None
    cache: States
    if device.type == "cpu":
        kept = "" if target.kept_dtype == own.dtype else f" {target.kept_dtype}"
        numerics = f"{own.dtype} {own.kernels.name}{kept} {dtype} {device.type}"
        cache = StateCaches(list(_caches(plan, manifests, texts, layers, target.config.hidden_size, numerics)))
    else:
        lengths, width = [len(ids) for ids in joined.token_ids], target.config.hidden_size
        room = min(plan.cache_gb, torch.cuda.mem_get_info(device)[0] / 2e9)
        cache = StateMemory(lengths, layers=len(layers), width=width, gigabytes=room, device=device)
    return TargetStates(joined, target, layers, cache, dtype=dtype, normalise=not plan.shape.plain_tap, hinted=hinted)


def _caches(
    plan: RunPlan,
    manifests: Sequence[Manifest],
    texts: Sequence[Texts],
    layers: Sequence[int],
    width: int,
    numerics: str,
) -> Iterator[StateCache]:
    """One a data set; a later one gets the room that those before leave."""
    left = plan.cache_gb
    for number, (manifest, some) in enumerate(zip(manifests, texts, strict=True)):
        cache = StateCache(
            plan.cache_of(number),
            {"data": manifest.identity, "texts": some.digest(), "layers": list(layers), "numerics": numerics},
            [len(ids) for ids in some.token_ids],
            layers=len(layers),
            width=width,
            gigabytes=left,
        )
        left -= cache.bytes / 1e9
        yield cache


def prepare(
    plan: RunPlan,
    source: TensorSource,
    target: TargetConfig,
    states: TargetStates,
    training: Sequence[int],
    exchange: Exchange,
) -> tuple[Drafter, Standardisation]:
    """The drafter at its start; the first process decides what the run keeps to."""
    torch.manual_seed(plan.settings.seed)
    config = drafter_config(target, plan.shape, name=plan.name)
    if issubclass(CLASSES[config.architecture], ParallelDrafter):  # a chain is as long as it is run
        cuts = sorted({length for length in plan.settings.lengths if length < config.block_size})
        config = replace(config, cut_lengths=tuple(cuts))
    device = torch.device(plan.device)
    dtype = pick_dtype("auto", device)
    embed, head = (
        tensor.to(device) for tensor in target_tensors(plan.target, target.vocab_size, target.hidden_size, dtype)
    )
    if exchange.rank == 0 and not (plan.run / SETUP_FILE).exists():
        save_setup(plan.run, *_decide(plan, config, target, head, states, training))
    exchange.meet()
    d2t, standardisation = load_setup(plan.run)
    d2t, standardisation = d2t.to(device), standardisation.to(device)
    own_head = head[torch.arange(len(d2t), device=device) + d2t].to(dtype)
    reduced = d2t if config.reduced_vocabulary else None
    drafter = CLASSES[config.architecture](config, embed_weight=embed, head_weight=own_head, d2t=reduced).to(device)
    if plan.begin_with is not None:
        begin_with(plan.begin_with, drafter, standardisation)
    elif plan.warm_start:
        start_from_target(drafter, source, target, standardisation)
        absorb_post_norms(drafter, source, target, lambda: _first_rows(drafter, states, training, standardisation))
    return drafter, standardisation


def _decide(
    plan: RunPlan,
    config: DrafterConfig,
    target: TargetConfig,
    head: Tensor,
    states: TargetStates,
    training: Sequence[int],
) -> tuple[Tensor, Standardisation]:
    """What the run keeps to, on the CPU: d2t (draft vocabulary,) and standardisation."""
    d2t, kept = (None, None) if plan.begin_with is None else beginning_of(plan.begin_with)
    if d2t is not None and kept is not None:
        return d2t, kept
    sample = sample_batch(states, training, SETUP_TEXTS)
    if d2t is None:
        wide = head.to(sample.hidden.dtype)
        rows = spread(training, VOCABULARY_TEXTS.get(head.device.type, SETUP_TEXTS))
        batches = (states.batch(rows[n : n + SETUP_TEXTS]) for n in range(0, len(rows), SETUP_TEXTS))
        d2t = draft_vocabulary(batches, wide, config.draft_vocab_size, keep=target.eos_token_ids)
    measured = as_it_is(sample.captured) if plan.shape.plain_tap else measure(sample.captured, sample.lengths)
    return d2t.cpu(), measured.to(torch.device("cpu"))


def _first_rows(
    drafter: Drafter, states: TargetStates, training: Sequence[int], standardisation: Standardisation
) -> None:
    batch = sample_batch(states, training, 8)
    standardisation.apply_(batch.captured)
    with arithmetic_of(drafter):
        block_rows(drafter, batch, sample_anchors(batch, 16, torch.Generator().manual_seed(0)))
