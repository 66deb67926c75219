"""`python -m training.collect`: have the target answer prompts, and keep its hidden states while it does.

Writes feature shards of some ten thousand tokens (about 6.5 KB a token), each whole or not at all; a directory that
was begun is gone on with. Leaves the choice of prompts to `training.data` and their use to `training.features`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from dspark.kernels import select_kernels
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import CachedSequence, KVCache
from dspark.models.target import TargetModel, load_target
from dspark.tokenizer import Tokenizer
from training.data import Prompt, mixed_prompts, read_questions
from training.initialise import Shape

_PREFILL_ROWS = 1024


@dataclass(slots=True)
class _Running:
    """One sequence while it grows; rows of `captured`, `hidden` and `logz` are those computed so far."""

    prompt: Prompt
    place: CachedSequence
    token_ids: list[int]
    captured: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    logz: list[Tensor] = field(default_factory=list)


class Collector:
    """Answers batches of prompts and hands back shards: tensors as `training.features` reads them."""

    def __init__(self, target: TargetModel, layer_ids: Sequence[int], *, max_new: int, seed: int) -> None:
        self.target = target
        self.layer_ids = tuple(layer_ids)
        self.max_new = max_new
        self.generator = torch.Generator().manual_seed(seed)

    def collect(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """One response a prompt, of at most `max_new` tokens, ending early with an end-of-sequence token."""
        cache = self._cache(prompts)
        longest = max(len(prompt.token_ids) for prompt in prompts) + self.max_new
        running = [_Running(p, cache.open(p.token_ids, longest), list(p.token_ids)) for p in prompts]
        for group in _groups(running, _PREFILL_ROWS):
            self._advance(group, cache)
        for _ in range(self.max_new - 1):
            alive = [one for one in running if one.token_ids[-1] not in self.target.config.eos_token_ids]
            if alive:
                self._advance(alive, cache)
        return _shard(running)

    def _cache(self, prompts: Sequence[Prompt]) -> KVCache:
        pages = sum((len(prompt.token_ids) + self.max_new) // 16 + 3 for prompt in prompts)
        pages = max(pages, len(prompts) * ((max(len(p.token_ids) for p in prompts) + self.max_new) // 16 + 3))
        target = self.target
        return KVCache(target.config, pages=pages, dtype=target.dtype, device=target.device, prefix_cache=False)

    @torch.inference_mode()
    def _advance(self, running: Sequence[_Running], cache: KVCache) -> None:
        """Compute what each sequence has uncomputed, and add its next token."""
        starts = [one.place.computed_len for one in running]
        items = [(one.place, one.token_ids[start:], start) for one, start in zip(running, starts, strict=True)]
        batch = RaggedBatch.build(items)
        forward = self.target.forward(batch, cache, capture=frozenset(self.layer_ids))
        captured = torch.stack([forward.captured[layer] for layer in self.layer_ids], 1)
        last = torch.tensor(batch.first_rows[1:]) - 1
        temperatures = torch.tensor([one.prompt.temperature for one in running])
        tokens, logz = draw(self.target.logits(forward.hidden[last]), temperatures, self.generator)
        for n, one in enumerate(running):
            rows = slice(batch.first_rows[n], batch.first_rows[n + 1])
            one.captured.append(captured[rows].cpu())
            one.hidden.append(forward.hidden[rows].cpu())
            one.logz.append(torch.cat([torch.zeros(rows.stop - rows.start - 1), logz[n : n + 1]]))
            cache.commit(one.place, one.token_ids, len(one.token_ids))
            one.token_ids.append(int(tokens[n]))


def draw(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token a row (n,) int64 at its own temperature, and log Z (n,) float32 at temperature 1, from (n, vocab) logits.

    A few rows at a time: a large vocabulary's float32 copies should stay in the processor's cache.
    """
    tokens, logz = [], []
    for rows, temperature in zip(torch.split(logits, 8), torch.split(temperatures, 8), strict=True):
        wide = rows.float()
        logz.append(torch.logsumexp(wide, -1))
        scaled = wide / temperature.clamp_min(1e-6)[:, None]
        drawn = torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator)[:, 0]
        tokens.append(torch.where(temperature > 0, drawn, wide.argmax(-1)))
    return torch.cat(tokens), torch.cat(logz)


def _groups(running: Sequence[_Running], rows: int) -> list[list[_Running]]:
    """Sequences whose prompts together have about `rows` tokens."""
    groups: list[list[_Running]] = [[]]
    filled = 0
    for one in running:
        if filled > rows:
            groups.append([])
            filled = 0
        groups[-1].append(one)
        filled += len(one.token_ids)
    return groups


def _shard(running: Sequence[_Running]) -> dict[str, Tensor]:
    """Sequences end to end. Last tokens were never computed: their rows repeat those before, and nothing uses them."""
    captured, hidden, logz = [], [], []
    for one in running:
        captured += [*one.captured, one.captured[-1][-1:]]
        hidden += [*one.hidden, one.hidden[-1][-1:]]
        logz += [*one.logz, one.logz[-1][-1:]]
    return {
        "token_ids": torch.tensor([token for one in running for token in one.token_ids], dtype=torch.int32),
        "captured": torch.cat(captured).flatten(1).to(torch.bfloat16),
        "hidden": torch.cat(hidden).to(torch.bfloat16),
        "logz": torch.cat(logz),
        "lengths": torch.tensor([len(one.token_ids) for one in running], dtype=torch.int32),
        "prompt_lengths": torch.tensor([len(one.prompt.token_ids) for one in running], dtype=torch.int32),
        "temperatures": torch.tensor([one.prompt.temperature for one in running]),
    }


def collect_shards(collector: Collector, prompts: Sequence[Prompt], directory: Path, *, per_shard: int) -> None:
    """Write the shards of `prompts` that are not there yet, and a manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = [prompts[at : at + per_shard] for at in range(0, len(prompts), per_shard)]
    for number, piece in enumerate(track(pieces, description="collecting")):
        path = directory / f"shard-{number:04d}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(collector.collect(piece), partial)
            partial.replace(path)
    manifest = {
        "target": collector.target.info.name,
        "model_fingerprint": collector.target.info.model_fingerprint,
        "layer_ids": list(collector.layer_ids),
        "max_new_tokens": collector.max_new,
        "prompts": len(prompts),
        "shards": len(pieces),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + os.linesep, encoding="utf-8")


def main() -> None:
    """Read the arguments, load the target, collect."""
    parser = argparse.ArgumentParser(prog="python -m training.collect", description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="target model: a Hugging Face directory")
    parser.add_argument("--prompts", type=Path, required=True, help='questions, one {"turns": ["…"]} a line')
    parser.add_argument("--out", type=Path, required=True, help="directory of feature shards")
    parser.add_argument("--count", type=int, default=2700, help="prompts to answer")
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    device = torch.device("cpu")
    target = load_target(given.target, dtype=torch.bfloat16, device=device, kernels=select_kernels("auto", device))
    tokenizer = Tokenizer((given.target / "tokenizer.json").read_bytes())
    prompts = mixed_prompts(tokenizer, read_questions(given.prompts), given.count, seed=given.seed)
    collector = Collector(target, Shape().target_layer_ids, max_new=given.max_new_tokens, seed=given.seed)
    collect_shards(collector, prompts, given.out, per_shard=96)


if __name__ == "__main__":
    main()
