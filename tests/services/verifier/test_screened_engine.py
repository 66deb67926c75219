"""An engine whose head is bounded first beside one that computes it whole: where laws are the same, so are tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.verifying import Stream, make_engine

from dspark.kernels import team
from dspark.messages import Mode, Sampling
from services.verifier.engine import VerifyEngine

llvm_kernels = pytest.importorskip("dspark.kernels.llvm_kernels")
screen_llvm = pytest.importorskip("dspark.kernels.screen_llvm")

pytestmark = pytest.mark.skipif(
    not team.available() or not llvm_kernels.multiplies_bfloat16(), reason="no AVX512-BF16 instructions here"
)
GREEDY = Sampling(temperature=0.0)
PROMPT = [2, *range(40, 70)]


@pytest.fixture(params=["tied", "untied"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tied":
        return tiny.save_gemma3(tmp_path, dtype=torch.bfloat16)
    return tiny.save_qwen3(tmp_path, dtype=torch.bfloat16, hidden_size=96)


def engines(path: Path) -> tuple[VerifyEngine, VerifyEngine]:
    """With and without: the tiny vocabulary has a screen only because it is told to."""
    own = llvm_kernels.ROUNDED
    screened, whole = (
        make_engine(path, kernels=replace(own, screen=screen)) for screen in (screen_llvm.ScreenedHead, lambda _: None)
    )
    return screened, whole


def run(engine: VerifyEngine, samplings: list[Sampling], **settings: Any) -> list[Stream]:
    """All of them side by side."""
    streams = [Stream(engine, str(n), PROMPT, sampling=own, **settings) for n, own in enumerate(samplings)]
    while going := [stream for stream in streams if not stream.done]:
        for stream, verdict in zip(going, engine.step([stream.item() for stream in going]).verdicts, strict=True):
            stream.take(verdict)
    engine.close([stream.key for stream in streams])
    return streams


def outputs(streams: list[Stream]) -> list[list[int]]:
    return [stream.output for stream in streams]


def test_what_is_judged_by_logits_is_the_same_beside_others(path: Path) -> None:
    screened, whole = engines(path)
    kinds = [
        GREEDY,
        Sampling(seed=1),
        Sampling(seed=2, top_p=0.8),
        Sampling(seed=3, mode=Mode.REJECTION),
        Sampling(seed=4, top_k=5, logprobs=2),
        replace(GREEDY, logprobs=1),
        Sampling(seed=1, logprobs=3),
    ]
    found, expected = outputs(run(screened, kinds)), outputs(run(whole, kinds))
    for place in (0, 2, 3, 4, 5):
        assert found[place] == expected[place]
    assert found[1] == found[6]  # asking for log-probabilities changes nothing
    assert outputs(run(screened, kinds)) == found


def test_drafts_change_no_token_and_neither_does_company(path: Path) -> None:
    screened, _ = engines(path)
    kinds = [GREEDY, *(Sampling(seed=seed, temperature=0.7) for seed in range(5))]
    plain = outputs(run(screened, kinds))
    told = {0: plain[0], 1: plain[1], 2: [3] * 40}

    def drafts(ids: list[int]) -> list[int]:
        at = len(ids) - len(PROMPT)
        likely = next((own for own in told.values() if own[:at] == ids[len(PROMPT) :]), [])
        return [*likely[at : at + 2], 7]

    streams = run(screened, kinds, drafts=drafts)
    assert outputs(streams) == plain
    assert sum(stream.accepted for stream in streams) > 10
    assert sum(stream.proposed - stream.accepted for stream in streams) > 10
    for place, sampling in enumerate(kinds):
        assert outputs(run(screened, [sampling])) == [plain[place]]
