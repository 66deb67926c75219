"""Training on a tiny random target: every drafter learns, steps follow from seed and number alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.data_sets import SETTINGS, SHAPE

from dspark.errors import ConfigError, Mismatch
from dspark.models.drafters import Drafter, DSparkDrafter, load_drafter
from training.blocks import block_rows, sample_anchors
from training.dataset import Texts, read_manifest, read_texts
from training.initialise import Shape, drafter_config, fold_for_serving, measure, spread_layers
from training.plan import RunPlan
from training.prepare import open_target, prepare, split, target_states, with_blocks
from training.run import own_device, train
from training.state import load_state, save_state
from training.trainer import Alone, StepReport, Trainer, TrainSettings, learning_rate
from training.validate import validate


def begin(plan: RunPlan) -> Trainer:
    plan.run.mkdir(exist_ok=True)
    texts = [read_texts(path) for path in plan.data]
    states = target_states(plan, [read_manifest(path) for path in plan.data], texts)
    training, _ = split(len(states.texts))
    with open_target(plan.target) as (source, config):
        drafter, standardisation = prepare(plan, source, config, states, training, Alone())
    return Trainer(drafter, states, training, standardisation, plan.settings)


def of(plan: RunPlan, architecture: str) -> RunPlan:
    layers = 1 if architecture == "eagle3" else 2
    return replace(plan, shape=replace(SHAPE, architecture=architecture, layers=layers))


def same_parameters(one: Drafter, other: Drafter) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3", "mtp"])
def test_learns_and_leaves_a_checkpoint(plan: RunPlan, architecture: str) -> None:
    plan = of(plan, architecture)
    trainer = begin(plan)
    _, held_out = split(48)
    before = validate(trainer.drafter, trainer.states, held_out, trainer.standardisation)
    outcome = train(plan, Alone(), lambda _: None)
    assert outcome.validation.tau > before.tau + 0.1
    assert len(outcome.validation.acceptance) == len(outcome.validation.greedy_acceptance) == 3
    assert outcome.cache_bytes <= 0.1e9
    loaded = load_drafter(plan.out, target_path=plan.target, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert loaded.config.architecture == architecture
    assert loaded.config.normalize_inputs
    log = (plan.run / "log.jsonl").read_text()
    assert '"event": "step"' in log
    assert '"event": "validation"' in log
    assert train(plan, Alone(), lambda _: None).step is None  # over already: nothing more to do, nothing broken


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_other_heads_learn(plan: RunPlan, head: str) -> None:
    plan = replace(plan, shape=replace(SHAPE, markov_head_type=head))
    losses: list[float] = []
    train(plan, Alone(), lambda step: losses.append(step.loss))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("architecture", ["dspark", "mtp"])
def test_stopped_run_goes_on_as_if_never_stopped(plan: RunPlan, architecture: str) -> None:
    plan = of(plan, architecture)
    whole = begin(plan)
    reports = [whole.step() for _ in range(6)]
    first = begin(plan)
    for _ in range(3):
        first.step()
    save_state(plan.run, first.drafter, first.optimizer, first.progress)
    second = begin(plan)
    second.progress = load_state(plan.run, second.drafter, second.optimizer)
    again = [second.step() for _ in range(3)]
    assert [report.loss for report in again] == [report.loss for report in reports[3:]]
    assert same_parameters(whole.drafter, second.drafter)


def test_averaged_gradients_stay_in_their_places(plan: RunPlan) -> None:
    """Where a recorded step writes them."""

    class Two(Alone):
        world = 2

    begun = begin(plan)
    trainer = Trainer(begun.drafter, begun.states, range(8), begun.standardisation, plan.settings, exchange=Two())
    trainer._gradients()
    places = [parameter.grad for parameter in trainer.parameters]
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer._update(1e-3)
    assert all(parameter.grad is place for parameter, place in zip(trainer.parameters, places, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_another_seed_takes_other_texts(plan: RunPlan) -> None:
    losses = {begin(replace(plan, settings=replace(SETTINGS, seed=seed))).step().loss for seed in (0, 1, 2)}
    assert len(losses) == 3


def test_run_begins_with_the_drafter_of_another(plan: RunPlan, tmp_path: Path) -> None:
    first = train(plan, Alone(), lambda _: None)
    more = replace(plan, run=tmp_path / "more", out=tmp_path / "better", begin_with=plan.run)
    begun = begin(more)
    _, held_out = split(48)
    assert validate(begun.drafter, begun.states, held_out, begun.standardisation) == first.validation
    assert train(more, Alone(), lambda _: None).validation.tau > first.validation.tau - 0.05
    with pytest.raises(ConfigError, match="no run to go on from"):
        train(replace(more, run=tmp_path / "other", begin_with=tmp_path / "nowhere"), Alone(), lambda _: None)
    shallow = replace(more, run=tmp_path / "shallow", shape=replace(SHAPE, layers=1))
    with pytest.raises(ConfigError, match=r"another shape: 2 layers \(--layers\)"):
        train(shallow, Alone(), lambda _: None)
    wider = replace(more, run=tmp_path / "wide", shape=replace(SHAPE, markov_rank=16))
    with pytest.raises(ConfigError, match="another shape"):
        train(wider, Alone(), lambda _: None)
    with pytest.raises(ConfigError, match="other begin_with"):
        train(replace(more, begin_with=None), Alone(), lambda _: None)


@pytest.mark.parametrize("layers", [(0, 99), (1, 1), (0, -2)])
def test_layers_that_no_tap_may_read_are_refused_before_anything_is_written(
    plan: RunPlan, layers: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="feature layers"):
        train(replace(plan, shape=replace(SHAPE, target_layer_ids=layers)), Alone(), lambda _: None)
    assert not plan.run.exists()


def test_run_begins_with_a_finished_checkpoint(plan: RunPlan, tmp_path: Path) -> None:
    first = train(plan, Alone(), lambda _: None)
    more = replace(plan, run=tmp_path / "more", out=tmp_path / "better", begin_with=plan.out)
    begun = begin(more)
    _, held_out = split(48)
    again = validate(begun.drafter, begun.states, held_out, begun.standardisation)
    assert again.acceptance == pytest.approx(first.validation.acceptance, abs=0.01)  # the checkpoint is in bfloat16
    # States are standardised anew, and what comes out is the same function of raw ones.
    states = begun.states.batch(held_out[:1]).captured
    served = load_drafter(plan.out, target_path=plan.target, dtype=torch.float32, device=torch.device("cpu"))
    torch.testing.assert_close(
        fold_for_serving(begun.drafter, begun.standardisation).features(states.float()),
        served.features(states.float()),
        atol=2e-3,
        rtol=2e-3,
    )
    with pytest.raises(ConfigError, match="another shape"):
        train(replace(more, run=tmp_path / "wide", shape=replace(SHAPE, markov_rank=16)), Alone(), lambda _: None)


@pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3"])
def test_blocks_are_cut_to_lengths_and_rows_stay_as_many(plan: RunPlan, architecture: str) -> None:
    cut = replace(of(plan, architecture), settings=replace(SETTINGS, lengths=(1, 3), anchors=4))
    trainer = begin(cut)
    seen = {len(trainer.step().acceptance) for _ in range(8)}
    assert seen == {1, 3}
    for _, anchors, length in trainer._draw(trainer.progress.step):
        assert anchors.shape[1] * length == 4 * 3
    with pytest.raises(ConfigError, match=r"lengths .* between 1 and the block's 3"):
        replace(SETTINGS, lengths=(4,)).check(1, 3)


def test_parts_of_a_step_are_as_good_as_the_whole(plan: RunPlan) -> None:
    whole, parts = begin(plan), begin(replace(plan, settings=replace(SETTINGS, accumulate=4)))
    for tolerance in (
        0.03,
        0.1,
    ):  # a part weighs its own rows, so the second steps start from slightly different places
        one, other = whole.step(), parts.step()
        assert one.loss == pytest.approx(other.loss, rel=tolerance)
    with pytest.raises(ConfigError, match="do not divide"):
        replace(SETTINGS, accumulate=3).check(1, 3)


def test_processes_of_one_machine_take_a_card_each() -> None:
    under_torchrun = {"LOCAL_RANK": "3"}
    assert own_device("cuda", under_torchrun) == "cuda:3"
    assert own_device("cuda:1", under_torchrun) == "cuda:1"
    assert own_device("cpu", under_torchrun) == "cpu"
    assert own_device("cuda", {}) == "cuda"


def test_texts_without_a_block_are_left_out() -> None:
    ids = [torch.arange(n, dtype=torch.int32) for n in (5, 6, 7)]
    assert with_blocks([0, 1, 2], Texts(ids, [4, 4, 6], [1.0] * 3)) == [1]


def test_labels_and_targets_follow_the_text(plan: RunPlan) -> None:
    trainer = begin(plan)
    drafter, batch = trainer.drafter, trainer.states.batch([1, 3])
    anchors = sample_anchors(batch, 12, torch.Generator().manual_seed(0))
    assert bool((anchors >= batch.prompt_lengths[:, None]).all())
    assert bool((anchors < batch.lengths[:, None] - 1).all())
    with torch.autocast("cpu", torch.bfloat16):
        rows = block_rows(drafter, batch, anchors)
    assert drafter.rows is not None
    seen = set()
    for s, a, k in torch.cartesian_prod(torch.arange(2), torch.arange(12), torch.arange(3)).tolist():
        at = int(anchors[s, a]) + k + 1
        assert bool(rows.valid[s, a, k]) == (at < int(batch.lengths[s]))
        seen.add(bool(rows.valid[s, a, k]))
        if rows.valid[s, a, k]:
            row = int(drafter.rows[batch.token_ids[s, at]])
            assert int(rows.labels[s, a, k]) == (row if row < 128 else -1)
            logits = batch.hidden[s, at - 1] @ drafter.head_weight.T
            expected = (logits.float() - batch.logz[s, at - 1]).exp()
            torch.testing.assert_close(rows.target[s, a, k], expected, atol=1e-3, rtol=0.1)
    assert seen == {True, False}


def test_loss_that_is_no_number_ends_the_run_and_spoils_nothing(plan: RunPlan) -> None:
    wild = replace(plan, settings=replace(SETTINGS, learning_rate=1e30, clip=1e30, warmup=0.0))
    with pytest.raises(ConfigError, match=r"the loss is .* at step"):
        train(wild, Alone(), lambda _: None)
    assert not wild.out.exists()


def test_run_directory_of_another_run_is_refused(plan: RunPlan) -> None:
    short = replace(plan, settings=replace(SETTINGS, blocks=32))
    train(short, Alone(), lambda _: None)
    with pytest.raises(ConfigError, match="begun with other settings"):
        train(plan, Alone(), lambda _: None)


def test_data_of_another_model_is_refused(plan: RunPlan, tiny_qwen: Path) -> None:
    with pytest.raises(Mismatch, match="was written by"):
        train(replace(plan, target=tiny_qwen), Alone(), lambda _: None)


def test_checkpoint_on_raw_states_equals_training_on_standardised_ones(plan: RunPlan) -> None:
    torch.manual_seed(0)
    raw = torch.randn(1, 50, 3, 64) * 4 + 1
    with open_target(plan.target) as (_, target):
        config = drafter_config(target, SHAPE, name="tiny")
    drafter = DSparkDrafter(config, embed_weight=torch.zeros(512, 64), head_weight=torch.zeros(128, 64))
    normalised = raw / raw.square().mean(-1, keepdim=True).sqrt()
    standardisation = measure(normalised, torch.tensor([50]))
    standardised = normalised.clone()
    standardisation.apply_(standardised)
    folded = fold_for_serving(drafter, standardisation)
    assert folded.config == replace(drafter.config, normalize_inputs=True)
    torch.testing.assert_close(folded.features(raw), drafter.features(standardised), atol=1e-4, rtol=1e-3)


def test_learning_rate_warms_up_and_comes_down() -> None:
    rates = [learning_rate(SETTINGS, fraction) for fraction in (0.0, 0.02, 0.04, 0.5, 1.0)]
    assert rates[0] < rates[1] < rates[2] == pytest.approx(5e-3)
    assert rates[2] > rates[3] > rates[4] > 0


def test_feature_layers_are_spread_and_never_the_last() -> None:
    assert spread_layers(18) == (1, 6, 11, 16)
    assert spread_layers(36, 5) == (1, 9, 18, 26, 34)
    assert spread_layers(3) == (1,)
    assert Shape().target_layer_ids == ()


def test_settings_count_steps() -> None:
    assert TrainSettings(blocks=6400, sequences=4, anchors=16).steps == 100


def test_report_is_finite(plan: RunPlan) -> None:
    step: StepReport = begin(plan).step()
    assert all(math.isfinite(value) for value in (step.loss, step.gradient_norm, *step.acceptance))
