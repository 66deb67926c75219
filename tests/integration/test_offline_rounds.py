"""A cluster's rounds are those that are played without one: what offline figures are worth."""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import pairs

from dspark.cli.offline import compare_rounds
from dspark.cluster import Cluster
from dspark.devices import pick_device, pick_numerics
from dspark.evaluation import Evaluation, Settings, evaluate
from dspark.models.drafters import Drafter, load_drafter
from dspark.models.target import TargetModel, load_target
from training.texts import answer, numbered_prompts

DEVICE = pick_device(os.environ.get("DSPARK_DEVICE", "cpu"))  # the workers' too: devices round each in their own way
NEW = 48
MADE = torch.Generator().manual_seed(9)


def ids(length: int) -> list[int]:
    return [2, *torch.randint(3, pairs.VOCAB, (length - 1,), generator=MADE).tolist()]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pairs.save_pair(tmp_path_factory.mktemp("pair"), ours=True)


def cluster_of(pair: tuple[Path, Path], dtype: str) -> Cluster:
    alone = ["--dtype", dtype, "--threads", "1"]
    # A policy that drafts in every round: what the scheduler leaves undrafted has nothing to be compared with.
    drafts = [*alone, "--no-lookup"]
    return Cluster(*pair, policy="fixed:4", draft_args=drafts, verify_args=alone, verify_length=4)


def served_pair(pair: tuple[Path, Path], dtype: str) -> tuple[TargetModel, Drafter]:
    """Both as workers compute them for that dtype."""
    own = pick_numerics("auto", dtype, DEVICE)
    target = load_target(pair[0], dtype=own.dtype, device=DEVICE, kernels=own.kernels)
    return target, load_drafter(pair[1], target_path=pair[0], dtype=own.dtype, device=DEVICE)


async def test_accepted_lengths_agree_near_and_far_and_behind_a_cached_prefix(
    pair: tuple[Path, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    target, drafter = served_pair(pair, dtype)
    short, far = [ids(3 + 7 * i) for i in range(10)], [ids(1500), ids(1460)]
    warm, cold = Settings(NEW, 1.0, 20), Settings(NEW, 0.0)
    async with cluster_of(pair, dtype) as cluster, cluster.client() as client:
        served = await client.describe()
        runs: list[tuple[Settings, Sequence[Sequence[int]], Evaluation]] = []
        for settings in (warm, cold):
            runs += [(settings, short, await evaluate(client, short, settings))]
            runs += [(settings, far, await evaluate(client, far, settings))]
        # The same beginnings once more: all of them are found in the prefix cache.
        behind = [[*prompt, 7, 11] for prompt in [*far, *short[5:]]]
        again = await evaluate(client, behind, warm)
        assert all(run.usage.cached_tokens > 0 for run in again.completions)
        assert again.completions[0].usage.cached_tokens > 1400
        runs.append((warm, behind, again))

    texts = answer(target, numbered_prompts(short, 1.0, 20), NEW)
    written = [text.token_ids[text.prompt_length :] for text in texts]
    assert written == [completion.token_ids for completion in runs[0][2].completions]
    for settings, prompts, result in runs:
        found = compare_rounds(result, prompts, settings, served, target, drafter)
        assert found["share"] >= 0.99
        assert found["untold_streams"] == 0
        assert found["missed"] <= 0.2 * found["rounds"]
        assert found["accepted"] > 10

    # A drafter that reads something else, and one that reads nothing at long contexts, do not pass.
    other = _blind(drafter)
    assert compare_rounds(runs[0][2], short, warm, served, target, other)["share"] < 0.97
    assert compare_rounds(runs[1][2], far, warm, served, target, other)["share"] < 0.97


def _blind(drafter: Drafter) -> Drafter:
    """Its features are those of other layers."""
    drafter.fc.weight.data = drafter.fc.weight.data.flip(1)
    drafter.__dict__.pop("tap", None)  # computed once
    return drafter


async def test_the_command_says_how_many_rounds_agree(pair: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, written = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    prompts.write_text("".join(json.dumps({"turns": [f"{i} and {i} are"]}) + "\n" for i in range(4)))
    command = [
        "-c",
        "from dspark.cli import main; main()",
        "evaluate",
        "--prompts",
        str(prompts),
        "--json",
        str(written),
    ]
    command += ["--model", str(pair[0]), "--drafter", str(pair[1]), "--dtype", "float32", "--max-tokens", "40"]
    done = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--compare", "offline", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await done.communicate()
    assert done.returncode == 0, out
    assert "rounds as offline" in out.decode()
    found = json.loads(written.read_text())["offline"]
    assert found["share"] >= 0.99
    assert found["accepted"] > 0
