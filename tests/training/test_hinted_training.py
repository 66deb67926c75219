"""Drafters that take hints: trained on the very hints they are served, and begun from one without."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.data_sets import SHAPE

from dspark.errors import ConfigError
from dspark.models.drafters import load_drafter
from services.draft.hints import hints_along
from training.dataset import read_manifest, read_texts
from training.plan import RunPlan
from training.prepare import open_target, prepare, split, target_states
from training.run import train
from training.states import TargetStates
from training.trainer import Alone, Trainer
from training.validate import validate

HINTED = replace(SHAPE, hint_lengths=(1, 2, 4))


def begin(plan: RunPlan) -> tuple[Trainer, TargetStates]:
    manifests, texts = [read_manifest(path) for path in plan.data], [read_texts(path) for path in plan.data]
    states = target_states(plan, manifests, texts)
    rows, _ = split(48)
    plan.run.mkdir(parents=True, exist_ok=True)
    with open_target(plan.target) as (source, config):
        drafter, standardisation = prepare(plan, source, config, states, rows, Alone())
    return Trainer(drafter, states, rows, standardisation, plan.settings), states


def test_a_batch_has_the_hints_of_its_texts(plan: RunPlan) -> None:
    _, states = begin(replace(plan, shape=HINTED))
    batch = states.batch([0, 7])
    assert batch.hints is not None
    for row, text in enumerate([0, 7]):
        ids = states.texts.token_ids[text].tolist()
        along = hints_along(ids, states.texts.prompt_lengths[text], (1, 2, 4), SHAPE.block_size)
        assert torch.equal(batch.hints.tokens[row, : len(ids)], along.tokens)
        assert torch.equal(batch.hints.kinds[row, : len(ids)], along.kinds)
    assert begin(replace(plan, run=plan.run.with_name("plain")))[1].batch([0]).hints is None


def test_a_drafter_without_hints_begins_to_take_them(plan: RunPlan, tmp_path: Path) -> None:
    train(plan, Alone(), lambda _: None)
    for number, beginning in enumerate((plan.run, plan.out)):
        more = replace(plan, run=tmp_path / f"more{number}", out=tmp_path / f"out{number}", begin_with=beginning)
        _, held_out = split(48)
        plain, hinted = begin(more), begin(replace(more, shape=HINTED, run=tmp_path / f"hinted{number}"))
        figures = [
            validate(trainer.drafter, states, held_out, trainer.standardisation) for trainer, states in (plain, hinted)
        ]
        assert figures[0] == figures[1]  # nothing is added before it is trained


def test_hints_are_learned_and_kept_in_the_checkpoint(plan: RunPlan) -> None:
    hinted = replace(plan, shape=HINTED)
    train(hinted, Alone(), lambda _: None)
    drafter = load_drafter(plan.out, target_path=plan.target, dtype=torch.float32, device=torch.device("cpu"))
    assert drafter.config.hint_lengths == (1, 2, 4)
    own = {name: tensor for name, tensor in drafter.named_parameters() if name.startswith("hints.")}
    assert sorted(own) == ["hints.kind.weight", "hints.proj.weight", "hints.strength"]
    assert bool(own["hints.proj.weight"].any())
    assert bool(own["hints.kind.weight"].any())
    assert bool((own["hints.strength"] != 1).any())
    with pytest.raises(ConfigError, match="takes hints"):
        train(replace(plan, run=plan.run.with_name("without"), begin_with=plan.out), Alone(), lambda _: None)
