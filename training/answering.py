"""`dspark train data`: prompts to a data set, resumable at every shard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dspark.errors import ConfigError
from dspark.models.target import TargetModel
from training.dataset import Manifest, Response, read_manifest, read_texts, shard_path, write_manifest, write_shard
from training.prompts import Prompt
from training.responses import Responder

__all__ = ["Plan", "Progress", "make_data_set"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write and how. `settings` goes into the manifest; a directory is gone on with under the same only."""

    directory: Path
    prompts: Sequence[Prompt]
    max_new: int
    longest: int
    settings: dict[str, Any] = field(default_factory=dict)
    per_shard: int = 128
    batch: int = 128
    first: int | None = None  # how many of the prompts to answer for now

    def manifest(self, target: TargetModel) -> Manifest:
        """The manifest of the finished data set, but for the count of tokens."""
        shards = -(-len(self.prompts) // self.per_shard)
        info, settings = target.info, json.loads(json.dumps(self.settings))
        return Manifest(
            info.name, info.model_fingerprint, info.vocab_size, len(self.prompts), self.per_shard, shards, settings
        )


@dataclass(slots=True)
class Progress:
    """How far a run is: tokens written by this run, prompts done in all, seconds."""

    prompts: int
    done: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_second(self) -> float:
        """Since this run started."""
        return self.tokens / max(time.monotonic() - self.started, 1e-9)


def make_data_set(plan: Plan, target: TargetModel, report: Callable[[Progress], None]) -> Manifest:
    """Answer all prompts that no finished shard answers; the manifest with the final count.

    Raises:
        ConfigError: no prompts, a directory that another run began, or a disk that refuses.
    """
    if not plan.prompts:
        raise ConfigError("there is no prompt to answer")
    manifest = plan.manifest(target)
    _claim(plan.directory, manifest)
    pieces = {
        n: range(n * plan.per_shard, min((n + 1) * plan.per_shard, len(plan.prompts))) for n in range(manifest.shards)
    }
    wanted = {n: piece for n, piece in pieces.items() if plan.first is None or piece.start < plan.first}
    missing = {n: piece for n, piece in wanted.items() if not shard_path(plan.directory, n).exists()}
    total = sum(map(len, wanted.values()))
    progress = Progress(total, done=total - sum(map(len, missing.values())))
    responder = Responder(target, longest=plan.longest, max_new=plan.max_new, batch=plan.batch)
    _answer(plan, missing, responder, progress, report)
    done = replace(manifest, response_tokens=read_texts(plan.directory).response_tokens)
    write_manifest(plan.directory, done)
    return done


def _claim(directory: Path, manifest: Manifest) -> None:
    """Begin a directory, or make sure that this very run began it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {directory}: {error}") from error
    if (directory / "manifest.json").exists():
        found = read_manifest(directory).identity
        differing = [key for key, value in manifest.identity.items() if found[key] != value]
        if differing:
            raise ConfigError(
                f"{directory} was begun with another {', '.join(differing)}: choose an empty directory or the same"
            )
    elif any(directory.iterdir()):
        raise ConfigError(f"{directory} is neither empty nor a data set")
    else:
        write_manifest(directory, manifest)


def _answer(
    plan: Plan, missing: dict[int, range], responder: Responder, progress: Progress, report: Callable[[Progress], None]
) -> None:
    """Answer prompt after prompt and write each shard when its last answer is there."""
    answers: dict[int, dict[int, Response]] = {shard: {} for shard in missing}

    def stepped(tokens: int) -> None:
        progress.tokens += tokens
        report(progress)

    for number, response in responder.answer(_numbered(plan.prompts, missing.values()), stepped):
        shard = number // plan.per_shard
        answers[shard][number] = response
        progress.done += 1
        if len(answers[shard]) == len(missing[shard]):
            finished = answers.pop(shard)
            write_shard(shard_path(plan.directory, shard), [finished[n] for n in missing[shard]])


def _numbered(prompts: Sequence[Prompt], pieces: Iterable[range]) -> Iterable[tuple[int, Prompt]]:
    return ((number, prompts[number]) for piece in pieces for number in piece)
