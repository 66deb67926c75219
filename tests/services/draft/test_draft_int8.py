"""Drafts over int8 weights: the same whatever shares their batch, drawn from what is reported, near the plain ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from support.drafting import GREEDY, attach, feed, item, key_of, make_any, make_drafter, make_engine, make_features

from dspark.costs.files import profiles_dir
from dspark.devices import pick_numerics
from dspark.errors import ConfigError
from dspark.kernels import Kernels, team
from dspark.messages import Mode, Proposal, Sampling
from dspark.models.drafters import save_drafter
from services.draft.engine import DraftEngine
from services.draft.layers import DraftStack, draft_layers
from services.draft.serving import prepare
from services.draft.settings import Settings

llvm_kernels = pytest.importorskip("dspark.kernels.llvm_kernels")

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not team.available() or not llvm_kernels.multiplies_int8(), reason="no AVX512-VNNI instructions here"
)
SAMPLINGS = (GREEDY, Sampling(seed=5), Sampling(seed=6, mode=Mode.REJECTION), Sampling(seed=7, temperature=0.5))


@pytest.fixture
def int8() -> Kernels:
    return pick_numerics("auto", "auto", CPU, weights="int8").kernels


def served(kernels: Kernels, architecture: str = "dspark") -> DraftEngine:
    drafter = make_drafter(markov_rank=64) if architecture == "dspark" else make_any(architecture)
    return make_engine(drafter, kernels=kernels)


def with_all(engine: DraftEngine) -> DraftEngine:
    for number, sampling in enumerate(SAMPLINGS):
        attach(engine, key_of(str(number)), sampling=sampling)
        feed(engine, key_of(str(number)), make_features(9 + 20 * number, seed=number))
    return engine


def proposals(engine: DraftEngine, *numbers: int) -> tuple[Proposal, ...]:
    """Without confidences, which torch computes, alone in other bits than together."""
    blocks = engine.propose([item(key_of(str(n)), 10 + 20 * n) for n in numbers]).proposals
    return tuple(replace(block, confidences=()) for block in blocks)


@pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3", "mtp"])
def test_the_same_blocks_in_any_company(int8: Kernels, architecture: str) -> None:
    engine = with_all(served(int8, architecture))
    together = proposals(engine, 0, 1, 2, 3)
    assert all(proposal.error is None for proposal in together)
    for numbers in ((3,), (0,), (2, 1), (1, 3, 0), (3, 2, 1, 0), (0, 1, 2, 3), (0, 1, 2, 3)):
        assert proposals(engine, *numbers) == tuple(together[number] for number in numbers)


def test_weights_are_rounded(int8: Kernels) -> None:
    plain = pick_numerics("auto", "auto", CPU).kernels
    found, expected = (with_all(served(own)).draft([item(key_of("0"), 10)]).logits[0] for own in (int8, plain))
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1


def test_down_projections_keep_their_weights(int8: Kernels) -> None:
    """Few of a gated layer's outputs are far larger than the rest."""
    drafter, plain = make_drafter(), pick_numerics("auto", "auto", CPU).kernels
    layer = DraftStack(drafter, int8, 8, 64)._layers[0]
    mlp = draft_layers(drafter)[0].mlp
    x = torch.randn(3, mlp.down_proj.weight.shape[1])
    assert torch.equal(layer.down(x), plain.linear(mlp.down_proj.weight)(x))
    x = torch.randn(3, mlp.up_proj.weight.shape[1])
    assert not torch.equal(layer.gated(x), plain.gated(mlp.gate_proj.weight, mlp.up_proj.weight, "gelu_tanh")(x))


def test_what_is_reported_is_what_tokens_are_drawn_from(int8: Kernels) -> None:
    engine = make_engine(make_drafter(markov_rank=64), kernels=int8)
    keys = [key_of(f"{seed}") for seed in range(2000)]
    for seed, key in enumerate(keys):
        attach(engine, key, sampling=Sampling(seed=seed, temperature=3.0, mode=Mode.REJECTION), max_len=12)
        feed(engine, key, make_features(9))
    blocks = engine.propose([item(key, 10, max_tokens=1) for key in keys]).proposals
    (law,) = {block.distributions[0] for block in blocks}
    logits = engine.draft([item(keys[0], 10, max_tokens=1)]).logits[0][0].double() / 3.0
    kept = logits[list(law.token_ids)].softmax(0)
    np.testing.assert_allclose(law.probabilities, kept, rtol=1e-4)
    drawn = [block.tokens[0] for block in blocks]
    counts = [drawn.count(token) for token in law.token_ids]
    assert sum(counts) == len(keys)
    assert scipy.stats.chisquare(counts, np.array(law.probabilities) / sum(law.probabilities) * len(keys)).pvalue > 1e-3


def settings_of(place: Path, target: Path, weights: str) -> Settings:
    save_drafter(make_drafter(), place)
    said = {"profile": "measure", "profile_seconds": 0.2, "draft_weights": weights}
    return Settings(drafter=place, target=str(target), store="redis://unused", **said)  # type: ignore[arg-type]


def test_costs_over_other_weights_are_others(tiny_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    kept = []
    for weights in ("plain", "int8", "auto"):
        engine, _ = prepare(settings_of(tmp_path / "drafter", tiny_gemma, weights))
        assert engine.costs is not None
        kept.append(engine.costs.model.profile.fingerprint)
    assert kept[0] != kept[1]
    assert kept[2] == kept[int(llvm_kernels.multiplies_bfloat16())]
    assert {path.stem for path in profiles_dir().glob("*.json")} == set(kept)


def test_a_processor_without_the_instructions(
    tiny_gemma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by name, and not taken by itself."""
    monkeypatch.setattr(llvm_kernels, "multiplies_int8", lambda: False)
    with pytest.raises(ConfigError, match=r"^weights: int8 needs a processor with AVX512-VNNI instructions$"):
        prepare(settings_of(tmp_path, tiny_gemma, "int8"))
    assert pick_numerics("auto", "auto", CPU, weights="auto") == pick_numerics("auto", "auto", CPU)
