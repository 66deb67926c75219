"""Target and drafters in the command's own process, for figures that need no cluster. Everything heavy loads lazily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark import program
from dspark.benchmarking.plan import fixed_length
from dspark.cluster import find_drafter
from dspark.errors import ConfigError
from dspark.evaluation import Evaluation, Settings
from dspark.events import ServerInfo
from dspark.messages import ModelInfo

if TYPE_CHECKING:
    from dspark.models.target import TargetModel
    from dspark.tokenizer import Tokenizer
    from training.proposers import AnyDrafter

__all__ = ["check_same_model", "compare_rounds", "open_drafter", "open_target", "open_tokenizer"]


def open_target(model: str, *, device: str = "auto", dtype: str | None = None) -> tuple[TargetModel, Path]:
    """A target by name, directory or GGUF file, and where it lies; as a verify worker loads it."""
    program.wait_briefly()
    from dspark.devices import pick_device, pick_numerics
    from dspark.models.pull import resolve_model
    from dspark.models.target import load_target

    where, path = pick_device(device), resolve_model(model)
    numerics = pick_numerics("auto", dtype or "auto", where)
    return load_target(path, dtype=numerics.dtype, device=where, kernels=numerics.kernels), path


def open_drafter(name: str, path: Path, target: TargetModel) -> AnyDrafter:
    """The drafter that a directory, "default" or "ngram" names, as a draft worker loads it; in the target's dtype."""
    from services.draft.architectures import load

    found = find_drafter(name, path)
    if found is None:
        raise ConfigError(f"drafter {name!r}: there is none for {path.name}; give a directory, or ngram")
    return load(found, path, dtype=target.dtype, device=target.device)


def open_tokenizer(path: Path, target: TargetModel) -> Tokenizer:
    """The tokenizer that the verify worker gives to routers."""
    from dspark.tokenizer import Tokenizer
    from services.verifier.tokenizer_files import tokenizer_files

    return Tokenizer(*tokenizer_files(path, target.info).values())


def check_same_model(ours: ModelInfo, theirs: ModelInfo) -> bool:
    """`ConfigError` unless both are the same model; whether they also compute with the same numerics."""
    if ours.model_fingerprint != theirs.model_fingerprint:
        raise ConfigError(
            f"the router serves {ours.name!r} ({ours.model_fingerprint}), compared with {theirs.name!r} "
            f"({theirs.model_fingerprint}): give the same model with --model"
        )
    return ours.numerics_fingerprint == theirs.numerics_fingerprint


def compare_rounds(
    result: Evaluation,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    served: ServerInfo,
    target: TargetModel,
    drafter: AnyDrafter,
) -> dict[str, Any]:
    """Each round of the streams against the one that is played offline at its place in the same text."""
    from dspark.devices import drafting
    from dspark.models.drafters import Drafter
    from training.agreement import Stream, compare
    from training.texts import Text, observe

    texts, streams = [], []
    for index, (ids, completion) in enumerate(zip(prompts, result.completions, strict=True)):
        seed = (settings.seed + index) % 2**64
        limit = len(ids) + settings.max_tokens
        texts.append(Text((*ids, *completion.token_ids), len(ids), limit, settings.temperature, seed))
        streams.append(Stream(result.gains(index), completion.speculation.missed_rounds))
    setting = "greedy" if settings.temperature == 0 else "coupled"
    observed = observe(target, texts, [drafter] if isinstance(drafter, Drafter) else [])
    length = min(served.verify_length, fixed_length(settings.policy or served.policy) or served.verify_length)
    found = compare(drafter, observed, streams, setting, verify_length=length, kernels=drafting(target.kernels))
    if not found.accepted:
        raise ConfigError("the cluster kept no draft token: agreement would say nothing")
    return {**asdict(found), "share": found.share}
