"""Data sets: who wrote them, going on after a stop, and directories that are none."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.data_sets import MAX_NEW, make_prompts

from dspark.errors import ConfigError
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel
from training.answering import Plan, Progress, make_data_set
from training.dataset import read_manifest, read_texts, shard_path
from training.prompts import Prompt
from training.responses import Responder


class Stopped(Exception):
    """Ends a run from within."""


def test_responses_are_the_targets(target: TargetModel, data_set: Path) -> None:
    texts = read_texts(data_set)
    assert len(texts) == 48
    assert texts.response_tokens == read_manifest(data_set).response_tokens
    for row in (1, 3, 47):
        ids, first = texts.token_ids[row].tolist(), texts.prompt_lengths[row]
        assert texts.temperatures[row] == 0
        assert tuple(ids[:first]) == make_prompts(48)[row].token_ids
        assert len(ids) - first == MAX_NEW or ids[-1] == 1
        cache = KVCache(target.config, pages=16, dtype=target.kept_dtype, device=target.device)
        place = cache.open(ids, len(ids) + 1)
        hidden = target.forward(RaggedBatch.build([(place, ids, 0)]), cache).hidden
        chosen = target.logits(hidden)[first - 1 : -1].argmax(-1)
        assert (chosen == torch.tensor(ids[first:])).float().mean() > 0.9  # bfloat16 ties may fall the other way


def test_stopped_run_goes_on_to_the_same_data(target: TargetModel, data_set: Path, tmp_path: Path) -> None:
    plan = Plan(tmp_path / "set", make_prompts(48), MAX_NEW, 16, {"seed": 1}, per_shard=20, batch=16)

    def stop(progress: Progress) -> None:
        if progress.done >= 22:
            raise Stopped

    with pytest.raises(Stopped):
        make_data_set(plan, target, stop)
    finished = [shard_path(plan.directory, n).exists() for n in range(3)]
    assert any(finished)
    assert not all(finished)
    resumed = replace(plan, batch=7)  # other company in the batch, the same answers
    make_data_set(resumed, target, lambda _: None)
    for number in range(3):
        ours, others = (load_file(shard_path(place, number)) for place in (plan.directory, data_set))
        assert all(torch.equal(ours[name], others[name]) for name in others)


def test_only_the_first_prompts_for_now(target: TargetModel, tmp_path: Path) -> None:
    plan = Plan(tmp_path / "set", make_prompts(30), 6, 16, per_shard=10, batch=16, first=15)
    make_data_set(plan, target, lambda _: None)
    assert len(read_texts(plan.directory)) == 20
    make_data_set(replace(plan, first=None), target, lambda _: None)
    assert len(read_texts(plan.directory)) == 30


def test_directory_of_another_run_is_refused(target: TargetModel, data_set: Path, tmp_path: Path) -> None:
    plan = Plan(data_set, make_prompts(48), MAX_NEW, 16, {"seed": 2}, per_shard=20)
    with pytest.raises(ConfigError, match="begun with another settings"):
        make_data_set(plan, target, lambda _: None)
    (tmp_path / "letters").write_text("mine")
    with pytest.raises(ConfigError, match="neither empty nor a data set"):
        make_data_set(replace(plan, directory=tmp_path), target, lambda _: None)
    with pytest.raises(ConfigError, match="no prompt"):
        make_data_set(replace(plan, prompts=[]), target, lambda _: None)


def test_what_is_no_data_set_is_refused(tmp_path: Path, data_set: Path) -> None:
    with pytest.raises(ConfigError, match="no data set"):
        read_texts(tmp_path)
    manifest = json.loads((data_set / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="no finished shard"):
        read_texts(tmp_path)
    shard_path(tmp_path, 0).write_bytes(b"half a shard")
    with pytest.raises(ConfigError, match="shard-00000"):
        read_texts(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        read_texts(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110  # a device, not a path
def test_full_disk_is_one_clear_error_and_leaves_no_shard(target: TargetModel, tmp_path: Path) -> None:
    plan = Plan(tmp_path / "set", make_prompts(4), 6, 16, per_shard=4)
    plan.directory.mkdir()
    blocked = Path(f"{shard_path(plan.directory, 0)}.partial")
    blocked.mkdir()  # as good as no room: the shard cannot be written
    (plan.directory / "manifest.json").write_text(json.dumps(vars_of(plan, target)))
    with pytest.raises(ConfigError, match="cannot write"):
        make_data_set(plan, target, lambda _: None)
    assert not shard_path(plan.directory, 0).exists()


def vars_of(plan: Plan, target: TargetModel) -> dict[str, object]:
    return plan.manifest(target).identity


def test_prompt_longer_than_a_step_is_answered(target: TargetModel) -> None:
    long = Prompt(tuple(3 + i % 200 for i in range(1500)), 0.0, 1)
    short = Prompt((2, 5), 0.0, 2)
    responder = Responder(target, longest=1500, max_new=4, batch=2)
    answers = dict(responder.answer([(0, long), (1, short)], lambda _: None))
    assert len(answers[0].token_ids) in range(1501, 1505)
    assert answers[0].token_ids[:1500] == long.token_ids
    alone = dict(Responder(target, longest=16, max_new=4, batch=1).answer([(1, short)], lambda _: None))
    assert answers[1] == alone[1]
