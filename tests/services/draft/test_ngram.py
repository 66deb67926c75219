"""Prompt lookup: what is found, what is copied, what it costs, and how it is served."""

import random
import time
from pathlib import Path

import pytest
import torch
from support.drafting import GREEDY, attach, item, key_of, make_engine

from dspark.errors import ConfigError, InvalidRequest, ModelFileError
from dspark.messages import FeatureBlock, Mode, Proposal, Sampling
from services.draft.architectures import load
from services.draft.engine import DraftEngine
from services.draft.ngram import Match, NgramContext, PromptLookup
from services.verifier.candidates import Candidate
from services.verifier.verification import verify

LOOKUP = PromptLookup(vocab_size=512)


def context_of(*ids: int) -> NgramContext:
    context = NgramContext((2, 3, 4))
    context.append(ids)
    return context


def found(*ids: int, count: int = 8) -> tuple[list[int], int]:
    match = context_of(*ids).lookup(count)
    return list(match.tokens), match.matched


def plain_lookup(ids: list[int], count: int) -> Match:
    """The definition, by search."""
    for length in range(4, 1, -1):
        for start in range(len(ids) - length - 1, -1, -1):
            if len(ids) > length and ids[start : start + length] == ids[-length:]:
                text = list(ids)
                while len(text) < start + length + count:
                    text.append(text[start + length + len(text) - len(ids)])
                return Match(text[start + length :][:count], length)
    return Match((), 0)


# ---------------------------------------------------------------- what is found


def test_what_followed_the_same_ids_is_copied() -> None:
    assert found(1, 2, 3, 4, 50, 51, 52, 53, 54, 55, 56, 57, 58, 1, 2, 3, 4) == (list(range(50, 58)), 4)
    assert found(1, 2, 3, 4, 50, 51, 52, 53, 1, 2, 3, 4, count=3) == ([50, 51, 52], 4)


def test_the_longest_end_counts_then_the_last_occurrence() -> None:
    assert found(1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3, count=1) == ([10], 3)  # not 20, though it came later
    assert found(8, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3, count=1) == ([20], 2)
    assert found(0, 1, 2, 3, 4, 10, 7, 1, 2, 3, 4, 20, 1, 2, 3, 4, count=1) == ([20], 4)


def test_new_text_and_single_ids_match_nothing() -> None:
    for ids in ((), (5,), (5, 6), (5, 6, 7, 5), (1, 2, 3, 4, 5, 6, 7, 8)):
        assert found(*ids) == ([], 0)


def test_a_loop_drafts_its_next_turns() -> None:
    assert found(9, 5, 5, 5) == ([5] * 8, 2)
    assert found(1, 2, 3, 1, 2, 3) == ([1, 2, 3, 1, 2, 3, 1, 2], 3)


def test_a_match_that_ends_at_the_anchor_is_not_the_end_itself() -> None:
    """The last ids are in the text but have no successor yet: they must not be found as their own match."""
    assert found(1, 2, 3, 4) == ([], 0)
    context = context_of(1, 2, 7, 1, 2)
    assert context.lookup(2) == Match([7, 1], 2)
    context.append([8])
    assert context.lookup(2) == Match((), 0)  # (2, 8) is new
    context.append([1, 2])
    assert context.lookup(2) == Match([8, 1], 2)  # the last occurrence now is the one before 8


def test_any_text_in_any_pieces_is_as_the_definition() -> None:
    chance = random.Random(3)
    for _ in range(60):
        ids = chance.choices(range(chance.choice([2, 4, 9])), k=80)
        context, done = NgramContext((2, 3, 4)), 0
        while done < len(ids):
            step = chance.randint(1, 9)
            context.append(ids[done : done + step])
            done += step
            expected = plain_lookup(ids[:done], 8)
            match = context.lookup(8)
            assert (list(match.tokens), match.matched) == (list(expected.tokens), expected.matched)


def test_a_round_costs_the_same_however_long_the_text() -> None:
    chance = random.Random(5)
    context = NgramContext((2, 3, 4))
    context.append(chance.choices(range(1000), k=200_000))
    began = time.perf_counter()
    for _ in range(2_000):
        context.append(chance.choices(range(1000), k=3))
        context.lookup(8)
    assert time.perf_counter() - began < 1.0  # a search of the text would take minutes


# ---------------------------------------------------------------- as it is served


def engine_with(ids: list[int], *settings: Sampling) -> DraftEngine:
    """A sequence "0", "1", … for each setting, with these ids; what precedes them all is position 0."""
    engine = make_engine(LOOKUP)
    for number, sampling in enumerate(settings):
        attach(engine, key_of(str(number)), sampling=sampling)
        engine.extend(key_of(str(number)), torch.empty(len(ids), 0), ids)
    return engine


def proposed(ids: list[int], sampling: Sampling = GREEDY, max_tokens: int = 8) -> Proposal:
    engine = engine_with(ids, sampling)
    asked = item(key_of("0"), len(ids) + 1, anchor=ids[-1], max_tokens=max_tokens)
    return engine.propose([asked]).proposals[0]


def test_blocks_of_different_lengths_in_one_batch() -> None:
    engine = make_engine(LOOKUP)
    texts = {"new": [1, 2, 3, 4, 5, 6], "loop": [9, 9, 9], "none": []}
    for name, ids in texts.items():
        attach(engine, key_of(name))
        engine.extend(key_of(name), torch.empty(len(ids), 0), ids)
    items = [item(key_of(name), len(ids) + 1, max_tokens=50) for name, ids in texts.items()]
    new, loop, none = engine.propose(items).proposals
    assert (new.tokens, new.confidences, new.error) == ((), (), None)
    assert loop.tokens == (9,) * 8
    assert (none.tokens, none.error) == ((), None)


def test_confidences_grow_with_what_agrees() -> None:
    short, long = proposed([1, 2, 7, 1, 2]), proposed([1, 2, 3, 4, 7, 1, 2, 3, 4], max_tokens=3)
    assert short.confidences == pytest.approx([m / (m + 2) for m in range(2, 10)])
    assert long.confidences == pytest.approx([4 / 6, 5 / 7, 6 / 8])


@pytest.mark.parametrize("mode", Mode)
def test_drafts_are_certain(mode: Mode) -> None:
    """In rejection mode they stand with the target's own probability, so nothing is lost and nothing biased."""
    sampling = Sampling(seed=3, mode=mode)
    proposal = proposed([1, 2, 3, 1, 2], sampling)
    assert proposal.tokens == (3, 1, 2, 3, 1, 2, 3, 1)
    assert len(proposal.distributions) == (8 if mode is Mode.REJECTION else 0)
    assert all(distribution.token_ids == () for distribution in proposal.distributions)
    logits = torch.full((9, 512), -1e4)
    for row, token in enumerate((*proposal.tokens[:3], 400, *proposal.tokens[4:], 0)):
        logits[row, token] = 0.0
    (outcome,) = verify(logits, [Candidate(sampling, 0, 6, proposal.tokens, proposal.distributions)])
    assert (outcome.accepted, outcome.token, outcome.error) == (3, 400, None)


def test_ids_come_over_the_wire_without_features() -> None:
    engine, ids = make_engine(LOOKUP), (1, 2, 3, 1, 2, 3, 1)
    attach(engine, key_of())
    assert engine.append_features([FeatureBlock(key_of(), 2, 3, token_ids=ids[2:5])]) == [key_of()]
    first, second = (FeatureBlock(key_of(), start, stop - start, token_ids=ids[start:stop]) for start, stop in
                     ((0, 4), (2, 7)))  # fmt: skip
    assert engine.append_features([first, second]) == []
    assert engine.length(key_of()) == 7
    assert engine.propose([item(key_of(), 8)]).proposals[0].tokens == (2, 3, 1, 2, 3)
    with pytest.raises(InvalidRequest, match="2 positions came with 1 token ids"):
        engine.append_features([FeatureBlock(key_of(), 7, 2, token_ids=(1,))])


def test_the_vocabulary_is_the_targets(tiny_gemma: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    loaded = load(Path("ngram"), tiny_gemma, dtype=torch.float32, device=cpu)
    assert isinstance(loaded, PromptLookup)
    assert (loaded.info.name, loaded.info.vocab_size, loaded.info.tap_id) == ("ngram", 512, "")
    with pytest.raises(ConfigError, match="target is needed"):
        load(Path("ngram"), None, dtype=torch.float32, device=cpu)
    with pytest.raises(ModelFileError, match="nowhere"):
        load(Path("ngram"), tmp_path / "nowhere", dtype=torch.float32, device=cpu)
