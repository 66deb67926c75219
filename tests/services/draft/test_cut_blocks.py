"""Shorter blocks for fewer tokens: as long as the drafter was trained with, each its own, whatever its company."""

from typing import Any

import pytest
import torch
from support.drafting import attach, feed, item, key_of, make_any, make_drafter, make_engine, make_features

from dspark.models.drafters import ParallelDrafter

CUTS: dict[str, Any] = {"block_size": 7, "cut_lengths": (1, 3), "learned_mask": True}


def test_the_shortest_that_holds_as_many() -> None:
    config = make_drafter(**CUTS).config
    assert [config.cut(count) for count in range(1, 8)] == [1, 3, 3, 7, 7, 7, 7]
    assert make_drafter().config.cut(1) == 5


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("architecture", ["dspark", "dflash"])
def test_a_cut_block_is_the_modules(architecture: str, wanted: int) -> None:
    drafter = make_any(architecture, **CUTS)
    assert isinstance(drafter, ParallelDrafter)
    engine, key, features = make_engine(drafter), key_of(), make_features(40)
    attach(engine, key)
    feed(engine, key, features)
    drafted = engine.draft([item(key, 41, max_tokens=wanted)])
    length = drafter.config.cut(wanted)
    captured = torch.randn(1, 41, len(drafter.config.target_layer_ids), drafter.config.hidden_size)
    short = make_any(architecture, **{**CUTS, "block_size": length, "cut_lengths": ()})
    plain = make_engine(short)
    attach(plain, key)
    feed(plain, key, features)
    assert drafted.tokens.shape == (1, wanted)
    assert torch.equal(drafted.tokens, plain.draft([item(key, 41, max_tokens=wanted)]).tokens)
    anchors = torch.tensor([[20]])
    hidden = drafter.training_hidden(captured, torch.full((1, 41), 7), anchors, length)
    assert torch.equal(hidden, short.training_hidden(captured, torch.full((1, 41), 7), anchors))


def test_a_block_does_not_know_how_long_the_others_are() -> None:
    engine = make_engine(make_drafter(**CUTS, hint_lengths=(1, 2)))
    items = []
    for number, wanted in enumerate((1, 7, 2, 3, 5, 1)):
        key = key_of(str(number))
        attach(engine, key)
        feed(engine, key, make_features(30 + 20 * number, seed=number))
        items.append(item(key, 31 + 20 * number, max_tokens=wanted))
    together = [proposal.tokens for proposal in engine.propose(items).proposals]
    assert together == [engine.propose([one]).proposals[0].tokens for one in items]
    assert [len(tokens) for tokens in together] == [1, 7, 2, 3, 5, 1]
