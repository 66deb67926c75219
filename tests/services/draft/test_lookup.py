"""A drafter with prompt lookup beside it: who drafts which block, and that nothing else changes."""

import pytest
import torch
from support.drafting import GREEDY, attach, item, key_of, make_any, make_drafter, make_engine, make_features

from dspark.messages import Mode, Proposal, ProposeItem, Sampling
from services.draft.engine import DraftEngine
from services.draft.ngram import NgramContext
from services.verifier.candidates import Candidate
from services.verifier.verification import verify

LOOP = [7, 8, 9, 10] * 8
NEW = list(range(100, 132))
SETTINGS = (GREEDY, Sampling(seed=3), Sampling(seed=3, mode=Mode.REJECTION))


def fed(engine: DraftEngine, name: str, ids: list[int], sampling: Sampling, *, with_ids: bool = True) -> ProposeItem:
    """A sequence with these ids behind position 0, and the item that asks for its next block."""
    attach(engine, key_of(name), sampling=sampling)
    engine.extend(key_of(name), make_features(len(ids), seed=len(name)), ids if with_ids else ())
    return item(key_of(name), len(ids) + 1, anchor=ids[-1])


def one(ids: list[int], sampling: Sampling, *, lookup: bool, with_ids: bool = True) -> Proposal:
    engine = make_engine(make_drafter(), lookup=lookup)
    return engine.propose([fed(engine, "a", ids, sampling, with_ids=with_ids)]).proposals[0]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_what_repeats_is_copied_and_what_does_not_is_the_drafters(sampling: Sampling) -> None:
    copied = one(LOOP, sampling, lookup=True)
    assert copied.tokens == (7, 8, 9, 10, 7)
    assert copied.confidences[0] > 0.9
    assert one(NEW, sampling, lookup=True) == one(NEW, sampling, lookup=False)


def test_a_batch_holds_both_in_its_order() -> None:
    engine, alone = make_engine(make_drafter(), lookup=True), make_engine(make_drafter())
    names = {"a": (NEW, GREEDY), "loop": (LOOP, SETTINGS[2]), "bcd": (NEW, SETTINGS[2]), "round": (LOOP, GREEDY)}
    items = [fed(engine, name, *text) for name, text in names.items()]
    proposals = engine.propose(items).proposals
    own = alone.propose([fed(alone, name, *names[name]) for name in ("a", "bcd")]).proposals
    assert (proposals[0], proposals[2]) == own
    assert proposals[1].tokens == proposals[3].tokens == (7, 8, 9, 10, 7)
    assert [d.token_ids for d in proposals[1].distributions] == [()] * 5  # certain
    assert all(d.token_ids for d in proposals[2].distributions)
    assert proposals[3].distributions == ()


def test_an_end_that_foretold_nothing_is_not_trusted_again() -> None:
    """The same four ids, and each time something else behind them."""
    context = NgramContext((2, 3, 4))
    for turn in range(12):
        context.append([1, 2, 3, 4, 50 + turn])
    context.append([1, 2, 3, 4])
    assert context.trust < 0.3
    for _ in range(20):
        context.append([1, 2, 3, 4])
    assert context.trust > 0.9


def test_without_ids_nothing_is_looked_up() -> None:
    assert one(LOOP, GREEDY, lookup=True, with_ids=False) == one(LOOP, GREEDY, lookup=False)


def test_a_drafter_without_confidences_stays_without_them() -> None:
    engine = make_engine(make_any("dflash"), lookup=True)
    new, loop = engine.propose([fed(engine, "a", NEW, GREEDY), fed(engine, "b", LOOP, GREEDY)]).proposals
    assert loop.confidences[0] > 0.9
    assert all(c != c for c in new.confidences)  # noqa: PLR0124 - NaN: unknown


def test_copied_drafts_stand_or_fall_by_the_targets_own_choice() -> None:
    sampling = SETTINGS[2]
    proposal = one(LOOP, sampling, lookup=True)
    logits = torch.full((6, 512), -1e4)
    for row, token in enumerate((*proposal.tokens[:2], 400, *proposal.tokens[3:], 0)):
        logits[row, token] = 0.0
    candidate = Candidate(sampling, 0, len(LOOP) + 1, proposal.tokens, proposal.distributions)
    (outcome,) = verify(logits, [candidate])
    assert (outcome.accepted, outcome.token, outcome.error) == (2, 400, None)
