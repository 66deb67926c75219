"""Offline rounds are those of the engines: same texts, same features bit for bit, same accepted lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import pairs
from support.deciding import Decoded, Decoder
from support.drafting import make_any

from dspark.errors import ConfigError, Mismatch
from dspark.messages import Sampling, SparseDistribution
from dspark.models.drafters import Drafter
from dspark.models.target import TargetModel
from services.draft.ngram import NgramContext, PromptLookup
from training.proposers import Proposer
from training.rounds import Rounds, follow, play
from training.texts import Observed, Text, answer, loops, numbered_prompts, observe

NEW = 30
MADE = torch.Generator().manual_seed(4)
PROMPTS = [[2, *torch.randint(3, pairs.VOCAB, (3 + 5 * i,), generator=MADE).tolist()] for i in range(8)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[TargetModel, Drafter]:
    return pairs.load_pair(pairs.save_pair(tmp_path_factory.mktemp("pair")))


def texts_of(target: TargetModel, temperature: float) -> list[Text]:
    return answer(target, numbered_prompts(PROMPTS, temperature, 40), NEW)


def observed_of(models: tuple[TargetModel, Drafter], temperature: float) -> list[Observed]:
    target, drafter = models
    return observe(target, texts_of(target, temperature), [drafter], laws=True, step_rows=16)


def decode(models: tuple[TargetModel, Drafter], temperature: float, verify_length: int = 99) -> list[Decoded]:
    decoder = Decoder(*models)
    settings = [Sampling(temperature=temperature, seed=40 + i) for i in range(len(PROMPTS))]
    return [
        decoder.decode(prompt, sampling, NEW, verify_length=verify_length)
        for prompt, sampling in zip(PROMPTS, settings, strict=True)
    ]


def rows_of(rounds: Rounds) -> list[tuple[int, int, int]]:
    return list(zip(rounds.text.tolist(), rounds.committed.tolist(), rounds.accepted.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "verify_length"), [(1.0, 99), (0.6, 2), (0.0, 99)])
def test_texts_features_and_rounds_are_the_engines(
    tmp_path: Path, dtype: torch.dtype, temperature: float, verify_length: int
) -> None:
    models = pairs.load_pair(pairs.save_pair(tmp_path), dtype)
    decoded = decode(models, temperature, verify_length)
    observed = observed_of(models, temperature)
    assert [list(one.text.token_ids) for one in observed] == [one.token_ids for one in decoded]
    for ours, theirs in zip(observed, decoded, strict=True):
        rows = ours.features[models[1].tap.tap_id][: len(ours.text) - 2]
        assert rows.view(torch.uint8).numpy().tobytes() == theirs.features

    setting = "greedy" if temperature == 0 else "coupled"
    rounds = play(models[1], observed, setting, verify_length=verify_length, batch=3, kernels=models[0].kernels)
    expected = [
        (text, committed, min(accepted, len(one.token_ids) - committed))  # none is known past the end of a text
        for text, one in enumerate(decoded)
        for committed, accepted in zip(one.committed, one.accepted, strict=True)
    ]
    assert rows_of(rounds) == expected
    assert rounds.accepted.sum() > 20
    assert (rounds.accepted < rounds.drafted).sum() > 20
    assert rounds.drafted.max() == min(5, verify_length)
    drafted = [len(drafts) for one in decoded for drafts in one.drafts]
    room = [observed[text].text.room(committed) for text, committed, _ in expected]
    assert rounds.drafted.tolist() == [min(pair) for pair in zip(drafted, room, strict=True)]


def test_a_batch_changes_nothing_and_every_length_holds_the_rounds(models: tuple[TargetModel, Drafter]) -> None:
    observed = observed_of(models, 1.0)
    for setting in ("coupled", "rejection"):
        together, alone = play(models[1], observed, setting), play(models[1], observed, setting, batch=1)
        assert rows_of(together) == rows_of(alone)
        torch.testing.assert_close(together.logits, alone.logits, equal_nan=True)
        every = play(models[1], observed, setting, every=True)
        assert len(every) == sum(len(one.text) - one.text.prompt_length - 1 for one in observed)
        assert set(rows_of(together)) < set(rows_of(every))
        assert rows_of(follow(every, every.drafted)) == rows_of(together)
        short = play(models[1], observed, setting, verify_length=2)
        assert rows_of(follow(every, torch.full_like(every.drafted, 2))) == rows_of(short)
        assert together.logits[torch.arange(together.block_size) < together.drafted[:, None]].isfinite().all()
        gained = together.accepted.sum() + len(together) - (together.committed + together.accepted >= 99).sum()
        assert gained >= sum(len(one.text) - one.text.prompt_length - 1 for one in observed)


@pytest.mark.parametrize("architecture", ["dflash", "eagle3", "mtp"])
def test_every_architecture_gets_the_rounds_that_the_engines_give_it(
    models: tuple[TargetModel, Drafter], architecture: str
) -> None:
    shapes: dict[str, Any] = {"vocab_size": pairs.VOCAB, "draft_vocab_size": pairs.VOCAB // 2, "hidden_size": 32}
    more: dict[str, Any] = {"num_target_layers": 5, "mask_token_id": 3, "block_size": 3}
    pair = models[0], make_any(architecture, **shapes, **more)
    decoded, observed = decode(pair, 1.0), observed_of(pair, 1.0)
    rounds = play(pair[1], observed, "coupled", kernels=pair[0].kernels)
    assert rounds.accepted.sum() > 5
    assert rounds.logits.isnan().all()
    assert rounds.committed.tolist() == [committed for one in decoded for committed in one.committed]
    assert 0 < play(pair[1], observed, "rejection").accepted.sum() < len(rounds)


def test_rejection_rounds_accept_what_the_laws_say(models: tuple[TargetModel, Drafter]) -> None:
    """A first draft token stands with probability sum of min(p, q), wherever the round begins."""
    target, drafter = models
    observed = observe(target, answer(target, numbered_prompts(PROMPTS * 3, 0.8, 7), NEW), [drafter], laws=True)
    proposer = Proposer(drafter, "rejection", observed, batch=len(observed), draft_top_k=8)
    overlaps = torch.tensor(_overlaps(proposer, target, observed), dtype=torch.float64)
    deviation = float((overlaps * (1 - overlaps)).sum().sqrt())

    def apart(setting: str) -> float:
        rounds = play(drafter, observed, setting, draft_top_k=8, every=True)
        first = (rounds.accepted > 0)[rounds.drafted > 0].double()
        return float((first - overlaps).sum()) / deviation

    assert abs(apart("rejection")) < 2
    assert apart("coupled") < -3  # the comparison bites


def _overlaps(proposer: Proposer, target: TargetModel, observed: list[Observed]) -> list[float]:
    """Sum of min(p, q) over the first draft token of every round in which something is drafted."""
    shares: dict[tuple[int, int], float] = {}
    for number, one in enumerate(observed):
        proposer.begin(number, one)
    for step in range(1, NEW):
        places = [(number, one.text.prompt_length + step) for number, one in enumerate(observed)]
        asked = [(number, at) for number, at in places if at < len(observed[number].text)]
        drawing = [(number, at) for number, at in asked if observed[number].text.room(at) > 0]
        proposer.propose(asked)
        blocks = proposer._engine.propose([proposer._item(*place) for place in asked]).proposals
        for place, block in zip(asked, blocks, strict=True):
            if place in drawing:
                shares[place] = _overlap(observed[place[0]], target, place[1], block.distributions[0])
    return [shares[place] for place in sorted(shares)]


def _overlap(one: Observed, target: TargetModel, position: int, q: SparseDistribution) -> float:
    logits = target.logits(one.hidden[position - one.text.prompt_length][None])[0].double()
    p = (logits / one.text.temperature).softmax(-1)
    return float(torch.minimum(p[list(q.token_ids)], torch.tensor(q.probabilities, dtype=torch.float64)).sum())


def test_prompt_lookup_is_played_too(models: tuple[TargetModel, Drafter]) -> None:
    lookup = PromptLookup(pairs.VOCAB, block_size=4)
    for temperature, setting in ((0.0, "greedy"), (0.6, "coupled"), (0.6, "rejection")):
        observed = observed_of(models, temperature)
        rounds = play(lookup, observed, setting)
        assert 0 < rounds.accepted.sum() < rounds.drafted.sum()
        for text, committed, accepted in rows_of(rounds):
            ids = observed[text].text.token_ids
            context = NgramContext(lookup.lengths)
            context.append(ids[1:committed])
            block = context.lookup(4).tokens[: observed[text].text.room(committed)]
            assert tuple(block[:accepted]) == ids[committed : committed + accepted]
            assert accepted == len(block) or block[accepted] != ids[committed + accepted]


def test_figures_of_rounds() -> None:
    zeros = torch.zeros(4, dtype=torch.int64)
    rounds = Rounds(torch.zeros(4, 3), torch.tensor([0, 1, 3, 1]), torch.tensor([3, 3, 3, 1]), zeros, zeros)
    assert rounds.tau == 2.25
    assert rounds.conditional_acceptance() == [0.75, 0.5, 1.0]
    assert Rounds.joined([rounds, rounds.select(rounds.accepted > 0)]).accepted.tolist() == [0, 1, 3, 1, 1, 3, 1]


def test_an_answer_that_repeats_itself_loops() -> None:
    def text(answer: list[int]) -> Text:
        return Text((2, 3, *answer), 2, 200, 0.0, 0)

    assert loops(text([9] * 48))
    assert loops(text([*range(30), *([*range(24)] * 2)]))
    assert not loops(text([9] * 47))
    assert not loops(text([*([*range(25)] * 3)]))
    assert not loops(text([*([9] * 60), 8]))


def test_what_does_not_fit_is_refused(models: tuple[TargetModel, Drafter], tmp_path: Path) -> None:
    target, drafter = models
    warm, cold = observed_of(models, 1.0), observed_of(models, 0.0)
    with pytest.raises(ConfigError, match="'fast' is none of rejection, coupled, greedy"):
        play(drafter, warm, "fast")
    with pytest.raises(ConfigError, match="greedy setting is played on texts drawn at temperature 0"):
        play(drafter, warm, "greedy")
    with pytest.raises(ConfigError, match="coupled setting is played on texts drawn at a temperature above 0"):
        play(drafter, cold, "coupled")
    bare = observe(target, [one.text for one in warm])
    with pytest.raises(ConfigError, match="observed with their laws"):
        play(drafter, bare, "rejection")
    with pytest.raises(ConfigError, match="were not observed for the drafter"):
        play(drafter, bare, "coupled")
    with pytest.raises(ConfigError, match="no prompt"):
        answer(target, [], 5)
    other = pairs.save_pair(tmp_path, num_hidden_layers=2)
    with pytest.raises(Mismatch, match="layer_ids"):
        observe(pairs.load_pair(other)[0], [one.text for one in warm], [drafter])
    assert len(play(drafter, [], "greedy")) == 0
