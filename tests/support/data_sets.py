"""A small data set that a tiny random target writes, and a plan to train on it."""

from pathlib import Path

import torch

from dspark.models.target import TargetModel
from training.answering import Plan, make_data_set
from training.initialise import Shape
from training.plan import RunPlan
from training.prompts import Prompt
from training.trainer import TrainSettings

MAX_NEW = 20
SHAPE = Shape(layers=2, block_size=3, target_layer_ids=(0, 2, 4), draft_vocab_size=128, markov_rank=8)
SETTINGS = TrainSettings(blocks=40 * 32, sequences=4, anchors=8, learning_rate=5e-3)
CPU = torch.device("cpu")


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt((2, 5 + i % 3, 7), 0.0 if i % 2 else 0.3, 100 + i) for i in range(count)]


def make(target: TargetModel, directory: Path) -> Path:
    plan = Plan(directory, make_prompts(48), MAX_NEW, 16, {"seed": 1}, per_shard=20, batch=16)
    make_data_set(plan, target, lambda _: None)
    return directory


def run_plan(target: Path, data: Path, directory: Path) -> RunPlan:
    return RunPlan(
        target=target,
        data=(data,),
        run=directory / "run",
        out=directory / "out",
        name="tiny",
        settings=SETTINGS,
        shape=SHAPE,
        cache=directory / "states",
        cache_gb=0.1,
        save_every=10,
        validate_every=10,
    )
