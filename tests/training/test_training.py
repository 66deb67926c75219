"""Training as a whole on a tiny random target: it learns, goes on as if never stopped, and saves what it validated."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark.kernels import select_kernels
from dspark.models.drafters import DSparkDrafter, load_drafter
from dspark.models.target import load_target
from training.blocks import block_rows, every_anchor, sample_anchors
from training.collect import Collector, collect_shards
from training.data import Prompt
from training.features import Sequences, gather, measure, read_shards, shard_files
from training.initialise import Shape, draft_vocabulary, drafter_config, fold_for_serving
from training.state import load_state, save_state
from training.train import RunPlan, open_target, prepare, work
from training.trainer import Alone, Trainer, TrainSettings, learning_rate
from training.validate import tally

CPU = torch.device("cpu")
SHAPE = Shape(layers=2, block_size=3, target_layer_ids=(0, 2, 4), draft_vocab_size=128, markov_rank=8)
SETTINGS = TrainSettings(steps=40, sequences=4, anchors=8, learning_rate=5e-3)


@pytest.fixture(scope="module")
def shards(tiny_gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    target = load_target(tiny_gemma, dtype=torch.float32, device=CPU, kernels=select_kernels("torch", CPU))
    prompts = [Prompt((2, 5 + i % 3, 7), 0.0 if i % 2 else 0.3) for i in range(24)]
    collect_shards(Collector(target, SHAPE.target_layer_ids, max_new=20, seed=1), prompts, directory, per_shard=12)
    return directory


@pytest.fixture
def plan(tiny_gemma: Path, shards: Path, tmp_path: Path) -> RunPlan:
    return RunPlan(tiny_gemma, shards, tmp_path / "run", tmp_path / "out", "tiny", 1, 60.0, SETTINGS, SHAPE)


def begin(plan: RunPlan) -> tuple[Trainer, Sequences]:
    plan.run.mkdir(exist_ok=True)
    with open_target(plan.target) as (source, target):
        start = prepare(plan, source, target, Alone())
    return Trainer(start.drafter, start.training, plan.settings), start.training


def test_collected_states_are_the_targets(tiny_gemma: Path, shards: Path) -> None:
    target = load_target(tiny_gemma, dtype=torch.float32, device=CPU, kernels=select_kernels("torch", CPU))
    config = drafter_config(target.config, SHAPE, name="tiny")
    sequences = read_shards(shard_files(shards), config)
    assert len(sequences) == 24
    assert int(sequences.lengths.sum()) == len(sequences.token_ids) == len(sequences.hidden)
    batch = gather(sequences, torch.tensor([1]))  # drawn at temperature 0, so each token is the most likely one
    assert batch.temperatures.tolist() == [0.0]
    first, last = int(batch.prompt_lengths), int(batch.lengths) - 1
    logits = target.logits(batch.hidden[0, first - 1 : last].float())
    assert (logits.argmax(-1) == batch.token_ids[0, first : last + 1]).float().mean() > 0.9  # states are bfloat16
    torch.testing.assert_close(torch.logsumexp(logits, -1), batch.logz[0, first - 1 : last], atol=0.1, rtol=0.02)
    assert batch.captured.float().square().mean(-1).sub(1).abs().max() < 0.02


def test_anchors_are_response_tokens(shards: Path, tiny_gemma: Path) -> None:
    with open_target(tiny_gemma) as (_, target):
        sequences = read_shards(shard_files(shards), drafter_config(target, SHAPE, name="tiny"))
    batch = gather(sequences, torch.arange(len(sequences)))
    drawn = sample_anchors(batch, 50, torch.Generator().manual_seed(0))
    assert bool((drawn >= batch.prompt_lengths[:, None]).all())
    assert bool((drawn < batch.lengths[:, None] - 1).all())
    every, real = every_anchor(batch)
    assert int(real.sum()) == int((batch.lengths - 1 - batch.prompt_lengths).sum())
    assert bool((every < batch.lengths[:, None] - 1).all())


def test_draft_vocabulary_keeps_likely_tokens_and_those_asked_for(shards: Path, tiny_gemma: Path) -> None:
    with open_target(tiny_gemma) as (source, target):
        sequences = read_shards(shard_files(shards), drafter_config(target, SHAPE, name="tiny"))
        head = source.get("model.embed_tokens.weight", (target.vocab_size, target.hidden_size), torch.float32)
    d2t = draft_vocabulary(sequences, head, 64, keep=(1, 500))
    ids = (torch.arange(64) + d2t).tolist()
    assert ids == sorted(set(ids))
    assert {1, 500} <= set(ids)
    greedy = sequences.select(sequences.temperatures == 0)
    batch = gather(greedy, torch.tensor([0]))
    assert set(batch.token_ids[0, int(batch.prompt_lengths) : int(batch.lengths)].tolist()) & set(ids)


def test_labels_and_targets_follow_the_sequence(plan: RunPlan) -> None:
    trainer, sequences = begin(plan)
    drafter, batch = trainer.drafter, gather(sequences, torch.tensor([1, 3]))
    anchors, real = every_anchor(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rows = block_rows(drafter, batch, anchors)
    assert drafter.head.rows is not None
    for s in range(2):
        for a in range(int(real[s].sum())):
            for k in range(3):
                at = int(anchors[s, a]) + k + 1
                assert bool(rows.valid[s, a, k]) == (at < int(batch.lengths[s]))
                if rows.valid[s, a, k]:
                    row = int(drafter.head.rows[batch.token_ids[s, at]])
                    assert int(rows.labels[s, a, k]) == (row if row < 128 else -1)
                    logits = batch.hidden[s, at - 1] @ drafter.head_weight.T
                    expected = (logits.float() - batch.logz[s, at - 1]).exp()
                    torch.testing.assert_close(rows.target[s, a, k], expected, atol=1e-3, rtol=0.1)


def test_learns(plan: RunPlan) -> None:
    trainer, sequences = begin(plan)
    before = tally(trainer.drafter, sequences).result()
    trainer.run(lambda _: None)
    after = tally(trainer.drafter, sequences).result()
    assert after.tau > before.tau + 0.2
    assert after.greedy_tau > before.greedy_tau
    assert len(after.acceptance) == len(after.greedy_acceptance) == 3


def test_stopped_run_goes_on_as_if_never_stopped(plan: RunPlan) -> None:
    whole, _ = begin(plan)
    for _ in range(6):
        whole.step()
    first, _ = begin(plan)
    for _ in range(3):
        first.step()
    save_state(plan.run, first.drafter, first.optimizer, first.progress)
    second, _ = begin(plan)
    second.progress = load_state(plan.run, second.drafter, second.optimizer)
    for _ in range(3):
        second.step()
    assert second.progress.step == whole.progress.step
    for (name, one), other in zip(whole.drafter.named_parameters(), second.drafter.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_checkpoint_on_raw_states_equals_training_on_standardised_ones(plan: RunPlan) -> None:
    torch.manual_seed(0)
    raw = torch.randn(50, 3, 64) * 4 + 1
    with open_target(plan.target) as (_, target):
        config = drafter_config(target, SHAPE, name="tiny")
    drafter = DSparkDrafter(config, embed_weight=torch.zeros(512, 64), head_weight=torch.zeros(128, 64))
    normalised = raw / raw.square().mean(-1, keepdim=True).sqrt()
    standardisation = measure(normalised)
    standardised = normalised.clone()
    standardisation.apply_(standardised)
    folded = fold_for_serving(drafter, standardisation)
    assert folded.config == replace(drafter.config, normalize_inputs=True)
    torch.testing.assert_close(folded.features(raw), drafter.features(standardised), atol=1e-4, rtol=1e-3)


def test_run_leaves_a_checkpoint_a_log_and_a_state(plan: RunPlan) -> None:
    short = replace(plan, settings=replace(SETTINGS, steps=20))
    short.run.mkdir()
    work(short, Alone())
    drafter = load_drafter(short.out, target_path=short.target, dtype=torch.bfloat16, device=CPU)
    assert drafter.config.normalize_inputs
    log = (short.run / "log.jsonl").read_text()
    assert '"event": "step"' in log
    assert '"event": "validation"' in log
    work(short, Alone())  # over already: nothing more to do, nothing broken


def test_learning_rate_warms_up_and_comes_down() -> None:
    rates = [learning_rate(SETTINGS, fraction) for fraction in (0.0, 0.02, 0.04, 0.5, 1.0)]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(5e-3)
    assert rates[2] > rates[3] > rates[4] > 0
