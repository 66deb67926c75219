"""A tiny target and its drafter, served by the real engines on Triton kernels: the tokens that torch gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support import tiny
from support.deciding import Decoded, Decoder
from support.drafting import make_drafter
from support.targets import new_cache, prefill

from dspark.kernels import TORCH, Kernels
from dspark.kernels.triton_kernels import TRITON
from dspark.messages import Mode, Sampling
from dspark.models.drafters import DSparkDrafter, save_drafter
from dspark.models.target import TargetModel, load_target
from services.draft import serving
from services.draft.dspark import DSparkBlocks
from services.draft.settings import Settings as DraftSettings
from services.verifier.settings import Settings as VerifySettings
from services.verifier.worker import prepare

VOCAB, STORE = 48, "redis://127.0.0.1:1"
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}
PROMPT, NEW = [2, 7, 9, 30, 11, 5, 6], 6
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0),
    "coupled": Sampling(temperature=0.8, top_p=0.95, seed=3),
    "warm": Sampling(temperature=1.5, seed=5),
    "rejection": Sampling(temperature=0.8, top_k=20, seed=4, mode=Mode.REJECTION),
}


def save_target(kind: str, path: Path) -> Path:
    if kind == "qwen3":
        return tiny.save_qwen3(path, **SMALL)
    layers = ["sliding_attention", "full_attention"]
    return tiny.save_gemma3(path, **SMALL, layer_types=layers, sliding_window=5, query_pre_attn_scalar=12)


def knowing(target: TargetModel, **changes: Any) -> DSparkDrafter:
    """A random drafter that knows the target's bigrams, so that some of its drafts stand."""
    drafter = make_drafter(
        block_size=3, vocab_size=VOCAB, draft_vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_layers=1,
        num_heads=2, num_kv_heads=1, head_dim=12, num_target_layers=2, target_layer_ids=(-1, 0), markov_rank=VOCAB,
        mask_token_id=VOCAB - 1, rope_thetas=(1e4,), **changes,
    )  # fmt: skip
    table = []
    for token in range(VOCAB):
        _, hidden = prefill(target, new_cache(target, prefix_cache=False), [2, token])
        table.append(target.logits(hidden[-1:])[0].float())
    drafter.head.markov_w1.weight.copy_(torch.eye(VOCAB))
    drafter.head.markov_w2.weight.copy_(torch.stack(table).T)
    drafter.head_weight.mul_(0.3)
    return drafter


def decode(path: Path, drafter: DSparkDrafter, kernels: Kernels, device: torch.device, sampling: Sampling) -> Decoded:
    target = load_target(path, dtype=torch.float32, device=device, kernels=kernels)
    return Decoder(target, drafter.to(device), draft_top_k=16, alternatives=True).decode(PROMPT, sampling, NEW)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3"])
def test_the_same_tokens_as_torch(device: torch.device, kind: str, tmp_path: Path) -> None:
    path, cpu = save_target(kind, tmp_path), torch.device("cpu")
    ours: dict[str, Any] = {"hint_lengths": (1, 2), "cut_lengths": (1,)} if kind == "gemma3" else {}
    drafter = knowing(load_target(path, dtype=torch.float32, device=cpu, kernels=TORCH), **ours)
    proposed = accepted = offered = 0
    for name, sampling in SAMPLINGS.items():
        expected = decode(path, drafter, TORCH, cpu, sampling)
        found = decode(path, drafter, TRITON, device, sampling)
        figures = ("token_ids", "drafts", "accepted", "offered", "turned")
        assert [getattr(found, one) for one in figures] == [getattr(expected, one) for one in figures], name
        offered += found.offered
        proposed += sum(map(len, found.drafts))
        accepted += sum(found.accepted)
        if sampling.mode is Mode.COUPLED:  # and what was drafted did not matter
            plain = Decoder(load_target(path, dtype=torch.float32, device=cpu, kernels=TORCH), drafter.to(cpu))
            assert plain.decode(PROMPT, sampling, NEW, verify_length=0).token_ids == found.token_ids
    assert 0 < accepted < proposed
    assert offered


def test_workers_load_them(device: torch.device, tmp_path: Path) -> None:
    """`--kernels triton` on both workers: loaded, warm, and part of the numerics fingerprint."""
    path = save_target("qwen3", tmp_path)
    own: dict[str, Any] = {"device": str(device), "dtype": "float32", "pages": 64, "profile": "off", "threads": 1}
    settings = VerifySettings(model=str(path), kernels="triton", noise_candidates=8, store=STORE, **own)
    engine, _ = prepare(settings, path)
    assert engine._kernels is TRITON
    other, _ = prepare(settings.model_copy(update={"kernels": "torch"}), path)
    infos = [replace(one.info, numerics_fingerprint="") for one in (engine, other)]
    assert infos[0] == infos[1]
    assert engine.info.numerics_fingerprint != other.info.numerics_fingerprint
    cpu, directory = torch.device("cpu"), tmp_path / "d"
    drafter = knowing(load_target(path, dtype=torch.float32, device=cpu, kernels=TORCH))
    save_drafter(drafter, directory)
    drafting, _ = serving.prepare(
        DraftSettings(drafter=directory, target=str(path), device=str(device), dtype="float32", kernels="triton",
                      profile="off", threads=1, lookup=False, store=STORE)
    )  # fmt: skip
    blocks = drafting._blocks
    assert isinstance(blocks, DSparkBlocks)
    assert blocks.stack.kernels is TRITON
