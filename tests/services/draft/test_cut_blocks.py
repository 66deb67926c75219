"""Shorter blocks for fewer tokens: as long as the drafter was trained with, each its own, whatever its company."""

from typing import Any

import pytest
import torch
from support.drafting import attach, feed, item, key_of, make_any, make_drafter, make_engine, make_features

from dspark.kernels import Kernels

CUTS: dict[str, Any] = {"block_size": 7, "cut_lengths": (1, 3), "learned_mask": True}


def test_the_shortest_that_holds_as_many() -> None:
    config = make_drafter(**CUTS).config
    assert [config.cut(count) for count in range(1, 8)] == [1, 3, 3, 7, 7, 7, 7]
    assert make_drafter().config.cut(1) == 5


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("architecture", ["dspark", "dflash"])
def test_a_cut_block_is_that_of_a_drafter_with_shorter_ones(architecture: str, wanted: int, kernels: Kernels) -> None:
    drafter = make_any(architecture, **CUTS)
    length = drafter.config.cut(wanted)
    whole = make_any(architecture, **{**CUTS, "cut_lengths": ()})
    short = make_any(architecture, **{**CUTS, "block_size": length, "cut_lengths": ()})
    features, key = make_features(40), key_of()
    found = []
    for one in (drafter, short, whole):
        engine = make_engine(one, kernels=kernels)
        attach(engine, key)
        feed(engine, key, features)
        found.append(engine.draft([item(key, 41, max_tokens=wanted)]))
    assert found[0].tokens.shape == (1, wanted)
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].top_logits(), found[1].top_logits())
    # The rows of a block see each other, so that whole ones are something else.
    assert torch.equal(found[0].top_logits(), found[2].top_logits()) == (length == 7)


def test_a_copied_block_beside_a_shorter_one() -> None:
    engine = make_engine(make_drafter(**CUTS), lookup=True)
    loop, new = key_of("loop"), key_of("new")
    for key in (loop, new):
        attach(engine, key)
    engine.extend(loop, make_features(40), [5, 6, 7, 8] * 10)
    feed(engine, new, make_features(40, seed=1))
    items = [item(loop, 41, anchor=8, max_tokens=7), item(new, 41, max_tokens=1)]
    together = [proposal.tokens for proposal in engine.propose(items).proposals]
    assert together[0] == (5, 6, 7, 8, 5, 6, 7)
    assert together == [engine.propose([one]).proposals[0].tokens for one in items]


def test_a_block_does_not_know_how_long_the_others_are(kernels: Kernels) -> None:
    engine = make_engine(make_drafter(**CUTS, hint_lengths=(1, 2)), kernels=kernels)
    items = []
    for number, wanted in enumerate((1, 7, 2, 3, 5, 1)):
        key = key_of(str(number))
        attach(engine, key)
        feed(engine, key, make_features(30 + 20 * number, seed=number))
        items.append(item(key, 31 + 20 * number, max_tokens=wanted))
    together = [proposal.tokens for proposal in engine.propose(items).proposals]
    assert together == [engine.propose([one]).proposals[0].tokens for one in items]
    assert [len(tokens) for tokens in together] == [1, 7, 2, 3, 5, 1]
