"""Hints: what followed the text's end the last time, told to the rows of a block."""

import pytest
import torch
from support.drafting import attach, feed, item, key_of, make_drafter, make_engine, make_features, token_at

from dspark.errors import InvalidRequest
from dspark.kernels import Kernels
from dspark.models.drafters import Hints
from services.draft.hints import hints_along, hints_of
from services.draft.ngram import NgramContext

LENGTHS = (1, 2, 4)


def text_of(ids: list[int]) -> NgramContext:
    context = NgramContext(LENGTHS)
    context.append(ids)
    return context


def test_the_longest_end_that_was_there_before_counts() -> None:
    looped = text_of([5, 6, 7, 8, 9, 5, 6, 7, 8])
    short = text_of([5, 6, 1, 6])
    hints = hints_of([looped, short, text_of([1, 2, 3])], LENGTHS, 3)
    assert hints.kinds.tolist() == [3, 1, 0]  # four ids agree, one id agrees, none does
    assert hints.tokens[:2].tolist() == [[9, 5, 6], [1, 6, 1]]


def test_hints_along_a_text_are_those_of_its_beginnings() -> None:
    ids = [2, *(int(n) for n in torch.randint(4, (60,), generator=torch.Generator().manual_seed(0)))]
    along = hints_along(ids, 20, LENGTHS, 5)
    assert not along.kinds[:20].any()
    assert set(along.kinds[20:].tolist()) >= {1, 2, 3}
    for place in range(20, len(ids)):
        one = hints_of([text_of(ids[1 : place + 1])], LENGTHS, 5)
        assert torch.equal(along.tokens[place], one.tokens[0])
        assert along.kinds[place] == one.kinds[0]


@pytest.mark.parametrize("length", [2, 37, 300])
def test_served_hints_are_the_modules(length: int, kernels: Kernels) -> None:
    drafter = make_drafter(hint_lengths=LENGTHS, learned_mask=True)
    engine, key, features = make_engine(drafter, kernels=kernels), key_of(), make_features(length)
    # Positions repeat every 64: from there on, text that was there before is what follows.
    ids = [token_at(place % 64) for place in range(length + 1)]
    attach(engine, key)
    engine.extend(key, features[: length // 2], ids[1 : length // 2 + 1])
    engine.extend(key, features[length // 2 :], ids[length // 2 + 1 :])
    drafted = engine.draft([item(key, length + 1, anchor=ids[-1])])
    context = [(k[None], v[None]) for k, v in drafter.context_kv(features.float(), torch.arange(length))]
    at = torch.tensor([length])

    def first_token(hints: Hints) -> tuple[int, float]:
        hidden = drafter.block_hidden(torch.tensor([ids[-1]]), at, context, at, hints)[:, 0]
        logits = drafter.base_logits(hidden) + drafter.head.step(None, torch.tensor([ids[-1]]), hidden)[0]
        return int(logits.argmax()), float(logits.max())

    own = hints_of([text_of(ids[1:])], LENGTHS, 5)
    token, top = first_token(own)
    assert int(own.kinds[0]) == (3 if length > 64 else 0)
    assert int(drafted.tokens[0, 0]) == token
    assert float(drafted.top_logits()[0, 0]) == pytest.approx(top, abs=1e-4)
    if length > 64:  # and they matter
        assert first_token(Hints(own.tokens, torch.zeros(1, dtype=torch.int64)))[1] != pytest.approx(top, abs=1e-2)


def test_a_block_does_not_know_its_company() -> None:
    drafter = make_drafter(hint_lengths=LENGTHS)
    engine = make_engine(drafter)
    keys = [key_of(name) for name in "abc"]
    for number, key in enumerate(keys):
        attach(engine, key)
        feed(engine, key, make_features(90 + 40 * number, seed=number), [3, 50])
    items = [item(key, 91 + 40 * number) for number, key in enumerate(keys)]
    together = engine.draft(items).tokens
    alone = torch.cat([engine.draft([one]).tokens for one in items])
    assert torch.equal(together, alone)


def test_positions_without_ids_are_refused_and_leave_nothing() -> None:
    engine, key = make_engine(make_drafter(hint_lengths=LENGTHS)), key_of()
    attach(engine, key)
    with pytest.raises(InvalidRequest, match="3 positions came with 0 token ids"):
        engine.extend(key, make_features(3))
    assert engine.length(key) == 0
