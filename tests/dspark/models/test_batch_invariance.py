"""A row's bits do not depend on what else is in the batch: alone or in a crowd, one row or eight, whole or in pieces.

Promise 1 rests on this: with it, near-ties break the same way whatever was scheduled when.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.targets import Piece, load, new_cache, prefill, random_ids, step

from dspark.kernels import team
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel

LENGTHS = (17, 63, 64, 127, 128, 255, 256, 257, 384, 511, 512, 530)
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma3": (tiny.save_gemma3, {}),
    "qwen3 one to one": (tiny.save_qwen3, {"num_key_value_heads": 4, "num_hidden_layers": 2}),
    "qwen3 three to one": (
        tiny.save_qwen3,
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "num_hidden_layers": 2,
        },
    ),
}


@pytest.fixture(params=["bfloat16", "float32", "float32 over bfloat16"])
def numbers(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype | None]:
    """Of rows, and of keys and values where these are others."""
    if request.param == "bfloat16":
        return torch.bfloat16, None
    if request.param == "float32":
        return torch.float32, None
    if not team.available():
        pytest.skip("this torch has no OpenMP that can be called")
    return torch.float32, torch.bfloat16


@pytest.fixture(params=list(SHAPES))
def model(
    request: pytest.FixtureRequest, tmp_path: Path, numbers: tuple[torch.dtype, torch.dtype | None]
) -> TargetModel:
    (save, changes), (dtype, kept) = SHAPES[request.param], numbers
    return load(save(tmp_path, **changes), dtype, kept=kept)


def crowd(model: TargetModel, cache: KVCache) -> list[Piece]:
    """Seven sequences in the middle of things and one that is being prefilled."""
    pieces = []
    for number, length in enumerate((3, 40, 64, 130, 200, 256, 400)):
        ids = random_ids(length + 8, tiny.VOCAB, seed=number + 1)
        sequence, _ = prefill(model, cache, ids[:length])
        pieces.append(Piece(sequence, ids[length : length + 1 + number], length))
    ids = random_ids(300, tiny.VOCAB, seed=99)
    return [*pieces, Piece(cache.open(ids, 320), ids, 0)]


def test_rows_do_not_depend_on_pieces(model: TargetModel) -> None:
    ids = random_ids(max(LENGTHS) + 8, tiny.VOCAB)
    cache = new_cache(model, pages=512, prefix_cache=False)
    _, whole = prefill(model, cache, ids, len(ids))
    for piece in (8, 17, 100, 128, 255, 512):
        assert torch.equal(prefill(model, cache, ids, piece)[1], whole), piece


def test_rows_do_not_depend_on_the_batch(model: TargetModel) -> None:
    ids = random_ids(max(LENGTHS) + 8, tiny.VOCAB)
    cache = new_cache(model, pages=1024)
    _, whole = prefill(model, cache, ids, 512)
    others = crowd(model, cache)
    for length in LENGTHS:
        sequence, _ = prefill(model, cache, ids[:length])
        for count in (1, 2, 5, 8):
            piece = Piece(sequence, ids[length : length + count], length)
            alone = step(model, cache, [piece])[0]
            assert torch.equal(alone, whole[length : length + count]), (length, count)
            together = step(model, cache, [*others[:count], piece, *others[count:]])
            assert torch.equal(together[count], alone), (length, count)
        cache.close(sequence)


def test_logits_do_not_depend_on_the_rows_asked_for(model: TargetModel) -> None:
    hidden = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    whole = model.logits(hidden)
    for count in (1, 2, 3, 5, 8, 9, 17, 63):
        assert torch.equal(model.logits(hidden[:count]), whole[:count]), count
        assert torch.equal(model.logits(hidden[64 - count :]), whole[64 - count :]), count


def test_rows_do_not_depend_on_cached_prefixes_or_rollbacks(model: TargetModel) -> None:
    ids = random_ids(300, tiny.VOCAB)
    cache = new_cache(model)
    first, whole = prefill(model, cache, ids)
    cache.close(first)
    again, tail = prefill(model, cache, ids)
    assert len(tail) < len(whole)
    assert torch.equal(tail, whole[-len(tail) :])
    wrong = random_ids(8, tiny.VOCAB, seed=5)
    step(model, cache, [Piece(again, wrong, len(ids))])  # drafts that are all rejected: nothing to undo
    more = random_ids(3, tiny.VOCAB, seed=6)
    after = step(model, cache, [Piece(again, more, len(ids))])[0]
    _, expected = prefill(model, new_cache(model), [*ids, *more])
    assert torch.equal(after, expected[-3:])


def test_a_fork_s_row_is_that_of_the_chain_it_stands_for(model: TargetModel) -> None:
    cache = new_cache(model, pages=512, prefix_cache=False)
    for length in (1, 14, 15, 16, 31, 32, 120, 127, 128, 250, 300):
        ids = random_ids(length, tiny.VOCAB, seed=length)
        drafts, others = (random_ids(6, tiny.VOCAB, seed=seed) for seed in (7, 8))
        sequence, _ = prefill(model, cache, ids)
        forks = [cache.fork(sequence, length + place) for place in range(1, 6)]
        pieces = [Piece(fork, [others[place]], length + place) for place, fork in enumerate(forks, 1) if fork]
        rows = step(model, cache, [Piece(sequence, drafts, length), *pieces])
        assert len(rows) == 6
        for place, row in enumerate(rows[1:], 1):
            alone, _ = prefill(model, cache, ids)
            chain = [*drafts[:place], others[place]]
            expected = step(model, cache, [Piece(alone, chain, length)])[0]
            assert torch.equal(rows[0][:place], expected[:-1]), (length, place)
            assert torch.equal(row, expected[-1:]), (length, place)
            cache.close(alone)
        cache.close(sequence)
        for fork in forks:
            assert fork is not None
            cache.join(fork)


def test_an_adopted_fork_is_as_if_the_chain_had_been_computed(model: TargetModel) -> None:
    cache = new_cache(model, pages=512, prefix_cache=False)
    for length in (14, 127, 300):
        ids = random_ids(length, tiny.VOCAB, seed=length)
        drafts, more = random_ids(4, tiny.VOCAB, seed=7), random_ids(3, tiny.VOCAB, seed=9)
        sequence, _ = prefill(model, cache, ids)
        for place in (1, 2, 3):
            fork = cache.fork(sequence, length + place)
            assert fork is not None
            step(model, cache, [Piece(sequence, drafts, length), Piece(fork, [5], length + place)])
            _, expected = prefill(model, cache, [*ids, *drafts[:place], 5, *more])
            if place == 2:  # the control: without it, the draft's keys and values are read
                sequence.computed_len = length + place + 1
                wrong = step(model, cache, [Piece(sequence, more, length + place + 1)])[0]
                assert not torch.equal(wrong, expected[-3:])
            cache.adopt(fork)
            cache.join(fork)
            sequence.computed_len = length + place + 1
            after = step(model, cache, [Piece(sequence, more, length + place + 1)])[0]
            assert torch.equal(after, expected[-3:]), (length, place)
        cache.close(sequence)


def test_thread_count_does_not_matter(tiny_gemma: Path, numbers: tuple[torch.dtype, torch.dtype | None]) -> None:
    ids = random_ids(300, tiny.VOCAB)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = load(tiny_gemma, numbers[0], kept=numbers[1])
            results.append(prefill(model, new_cache(model), ids, 100)[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
