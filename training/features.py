"""Target hidden states of whole sequences, kept in memory and served as training batches.

A shard file holds sequences end to end: `token_ids`, the captured layers, the final hidden state and log Z of the
target's logits at every position. Captured layers are divided by their root mean square and standardised once, when
read; `Standardisation.fold` puts the constants into W_c afterwards. Leaves making shards to `training.collect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dspark.models.drafters.config import DrafterConfig


@dataclass(frozen=True, slots=True)
class Sequences:
    """n tokens of many sequences, end to end.

    `token_ids` (n,) int32; `captured` (n, m, d) and `hidden` (n, d, after the final norm) bfloat16; `logz` (n,)
    float32, log of the sum of exp(logits); `starts`, `lengths`, `prompt_lengths` (s,) int64; `temperatures` (s,)
    float32, at which the response was drawn.
    """

    token_ids: Tensor
    captured: Tensor
    hidden: Tensor
    logz: Tensor
    starts: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    temperatures: Tensor

    def __len__(self) -> int:
        return len(self.starts)

    def select(self, rows: Tensor) -> Sequences:
        """The same tokens, but only some sequences' bounds."""
        return replace(
            self,
            starts=self.starts[rows],
            lengths=self.lengths[rows],
            prompt_lengths=self.prompt_lengths[rows],
            temperatures=self.temperatures[rows],
        )

    def split(self, every: int) -> tuple[Sequences, Sequences]:
        """Training and held-out sequences: each `every`-th is held out."""
        held_out = torch.arange(len(self)) % every == every - 1
        return self.select(~held_out), self.select(held_out)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some sequences padded to t tokens: `captured` (s, t, m, d), `hidden` (s, t, d), `logz` and `token_ids` (s, t)."""

    captured: Tensor
    hidden: Tensor
    logz: Tensor
    token_ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    temperatures: Tensor


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Mean and deviation (m, d) of root-mean-square-normalised hidden states, one row a captured layer."""

    mean: Tensor
    deviation: Tensor

    def apply_(self, captured: Tensor) -> None:
        """Standardise (n, m, d) in place, a piece at a time."""
        for piece in torch.split(captured, 8192):
            piece.copy_((piece.float() - self.mean) / self.deviation)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """W_c and bias that give on normalised states what `weight` and `bias` give on standardised ones."""
        folded = weight / self.deviation.flatten()
        shift = -(folded @ self.mean.flatten())
        return folded, shift if bias is None else bias + shift


def rms_normalise_(captured: Tensor, eps: float) -> None:
    """Divide every (…, d) row by its root mean square, in place, a piece at a time."""
    for piece in torch.split(captured, 8192):
        wide = piece.float()
        piece.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))


def measure(captured: Tensor, *, sample: int = 20_000) -> Standardisation:
    """Mean and deviation over some of the rows of (n, m, d)."""
    rows = captured[torch.linspace(0, len(captured) - 1, min(sample, len(captured))).long()].float()
    return Standardisation(rows.mean(0), rows.std(0).clamp_min(1e-3))


def shard_files(directory: Path) -> list[Path]:
    """Feature shards of a data directory, oldest name first."""
    return sorted(directory.glob("shard-*.safetensors"))


def read_shards(paths: Sequence[Path], config: DrafterConfig) -> Sequences:
    """All sequences of some shards, their captured layers root-mean-square-normalised."""
    parts: dict[str, list[Tensor]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in ("token_ids", "captured", "hidden", "logz", "lengths", "prompt_lengths", "temperatures"):
                parts.setdefault(name, []).append(file.get_tensor(name))
    tensors = {name: torch.cat(pieces) for name, pieces in parts.items()}
    captured = tensors["captured"].view(-1, len(config.target_layer_ids), config.hidden_size)
    rms_normalise_(captured, config.rms_norm_eps)
    lengths = tensors["lengths"].long()
    return Sequences(
        token_ids=tensors["token_ids"],
        captured=captured,
        hidden=tensors["hidden"],
        logz=tensors["logz"],
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        prompt_lengths=tensors["prompt_lengths"].long(),
        temperatures=tensors["temperatures"].float(),
    )


def gather(sequences: Sequences, rows: Tensor) -> Batch:
    """The sequences at `rows` (s,), padded at the end to the longest of them."""
    starts, lengths = sequences.starts[rows], sequences.lengths[rows]
    offsets = torch.arange(int(lengths.max()))
    index = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
    return Batch(
        captured=sequences.captured[index],
        hidden=sequences.hidden[index],
        logz=sequences.logz[index],
        token_ids=sequences.token_ids[index].long(),
        lengths=lengths,
        prompt_lengths=sequences.prompt_lengths[rows],
        temperatures=sequences.temperatures[rows],
    )
