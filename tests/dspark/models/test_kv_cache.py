"""Pages: reservations that hold, prefixes that are found again, windows that are freed, and who hears of it."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark.errors import InternalError, OutOfPages
from dspark.models.batch import RaggedBatch
from dspark.models.config import FULL, SLIDING, parse_config
from dspark.models.kv_cache import CachedSequence, KVCache

CPU = torch.device("cpu")
WINDOW = 40


def make_cache(pages: int = 32, *, sliding: bool = True, **changes: int | bool) -> KVCache:
    config = {
        "model_type": "gemma3_text" if sliding else "qwen3",
        "vocab_size": 64,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "sliding_window": WINDOW,
        "layer_types": [SLIDING, FULL] if sliding else [FULL, FULL],
        "rope_theta": 10_000.0,
    }
    target = parse_config(config, source="test")
    given_settings = {"lookahead": 0, "max_step_rows": 64} | changes
    return KVCache(target, pages=pages, dtype=torch.float32, device=CPU, **given_settings)  # type: ignore[arg-type]


def compute(cache: KVCache, sequence: CachedSequence, token_ids: list[int], step: int = 64) -> None:
    """What an engine does to pages, without a model."""
    while sequence.computed_len < len(token_ids):
        start = sequence.computed_len
        RaggedBatch.build([(sequence, token_ids[start : start + step], start)])
        cache.commit(sequence, token_ids, min(len(token_ids), start + step))


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(64), k=length)


def test_open_reserves_all_it_can_need_or_nothing() -> None:
    cache = make_cache(pages=10)
    first = cache.open(ids(5), 100)  # 7 pages
    assert cache.free_pages == 3
    with pytest.raises(OutOfPages, match="4 full_attention pages are needed, 3 are free"):
        cache.open(ids(5, 1), 64)
    assert cache.free_pages == 3
    second = cache.open(ids(5, 1), 48)
    compute(cache, first, ids(100))
    compute(cache, second, ids(48, 1))
    cache.close(first)
    cache.close(second)
    cache.close(second)
    assert cache.free_pages == cache.total_pages == 10


def test_lookahead_is_part_of_the_reservation() -> None:
    cache = make_cache(pages=4, lookahead=16)
    assert cache.total_pages == 3
    sequence = cache.open(ids(40), 48)
    compute(cache, sequence, ids(40))
    RaggedBatch.build([(sequence, ids(24), 40)])  # up to position 63
    with pytest.raises(InternalError, match="position 64 is past the sequence's reservation of 48 tokens"):
        RaggedBatch.build([(sequence, ids(25), 40)])


def test_prefix_is_found_but_never_the_last_token() -> None:
    cache = make_cache(sliding=False)
    prompt = ids(48)
    first = cache.open(prompt, 64)
    compute(cache, first, prompt)
    assert cache.open(prompt, 64).computed_len == 32  # 48 would leave no row to compute
    assert cache.open([*prompt, 1], 64).computed_len == 48
    assert cache.open([*prompt[:20], 99, *prompt[21:]], 64).computed_len == 16
    assert cache.open(prompt, 64, reuse=False).computed_len == 0


def test_shared_pages_are_one_page_and_counted_once() -> None:
    cache = make_cache(pages=10, sliding=False)
    prompt = ids(65)
    first = cache.open(prompt, 80)
    compute(cache, first, prompt)
    second = cache.open(prompt, 80)
    assert second.full_pages == first.full_pages[:4]
    assert cache.free_pages == 10 - 5 - 1
    cache.close(first)
    assert cache.free_pages == 10 - 5


def test_only_committed_tokens_become_reusable() -> None:
    cache = make_cache(sliding=False)
    prompt = ids(20)
    sequence = cache.open(prompt, 64)
    compute(cache, sequence, prompt)
    RaggedBatch.build([(sequence, ids(16, 3), 20)])  # drafts, all rejected
    cache.commit(sequence, [*prompt, 7], 20)
    assert cache.open([*prompt, *ids(16, 3)], 64).computed_len == 16


def test_hit_needs_the_last_window_of_sliding_pages() -> None:
    cache = make_cache(pages=64)
    prompt = ids(200)
    first = cache.open(prompt, 208)
    compute(cache, first, prompt)
    assert first.pages[SLIDING].count(0) == (200 - WINDOW + 1) // 16
    second = cache.open(prompt, 208)
    assert second.computed_len == 192
    assert second.pages[SLIDING][:9] == [0] * 9  # 192 - 40 + 1 = 153: page 9 is the first it sees
    assert 0 not in second.pages[SLIDING][9:]
    assert cache.open(prompt[:60], 208).computed_len == 48  # freed, but not given to others yet


def test_no_hit_where_the_window_is_gone() -> None:
    cache = make_cache(pages=64, sliding_pages=16)
    prompt = ids(200)
    first = cache.open(prompt, 200)
    compute(cache, first, prompt)
    cache.close(first)
    assert cache.open(prompt[:100], 16 * 6).computed_len == 96
    other = cache.open(ids(112, 1), 112)
    compute(cache, other, ids(112, 1))  # takes the sliding pages that were freed first
    assert cache.open(prompt[:33], 48).computed_len == 0


def test_freed_window_cannot_be_computed_again() -> None:
    cache = make_cache(pages=64)
    sequence = cache.open(ids(200), 208)
    compute(cache, sequence, ids(200))
    with pytest.raises(InternalError, match="the window of position 20 has been freed"):
        RaggedBatch.build([(sequence, [1], 20)])
    with pytest.raises(InternalError, match="only 200 positions are computed"):
        RaggedBatch.build([(sequence, [1], 201)])


def test_least_recently_used_pages_go_first_and_listeners_hear_of_it() -> None:
    cache = make_cache(pages=6, sliding=False)
    heard: list[int] = []
    cache.on_evict(heard.append)
    sequences = []
    for seed in (1, 2):
        sequence = cache.open(ids(33, seed), 33)
        compute(cache, sequence, ids(33, seed))
        sequences.append(sequence)
    pages = [list(sequence.full_pages) for sequence in sequences]
    generation = cache.generation(pages[1][1])
    cache.close(sequences[1])
    cache.close(sequences[0])
    heard.clear()
    third = cache.open(ids(48, 3), 48)
    compute(cache, third, ids(48, 3))
    # free pages (the unfinished third ones, last freed first), then the end of the sequence that was closed first
    assert heard == third.full_pages == [pages[0][2], pages[1][2], pages[1][1]]
    assert cache.generation(pages[1][1]) == generation + 1
    assert cache.open(ids(33, 2), 17).computed_len == 16


def test_pages_that_were_used_are_taken_before_untouched_ones() -> None:
    """Memory is really taken when it is first written, which on some machines costs more than the step."""
    cache = make_cache(pages=64, sliding=False, prefix_cache=False)
    touched: set[int] = set()
    for seed in range(8):
        sequence = cache.open(ids(33, seed), 33)
        compute(cache, sequence, ids(33, seed))
        touched |= set(sequence.full_pages)
        cache.close(sequence)
    assert len(touched) == 3


def test_drop_prefixes() -> None:
    cache = make_cache()
    sequence = cache.open(ids(40), 48)
    compute(cache, sequence, ids(40))
    cache.close(sequence)
    assert cache.cached_pages == 2
    cache.drop_prefixes()
    assert cache.cached_pages == 0
    assert cache.open(ids(40), 48).computed_len == 0


def test_prefix_cache_can_be_off() -> None:
    cache = make_cache(prefix_cache=False)
    sequence = cache.open(ids(40), 48)
    compute(cache, sequence, ids(40))
    assert cache.open(ids(40), 48).computed_len == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90), st.integers(0, 60)), min_size=5, max_size=40))
def test_reservations_always_hold(actions: list[tuple[int, int, int]]) -> None:
    """However sequences come, run to their limit and go, none that was opened ever runs out."""
    cache = make_cache(pages=24, sliding_pages=16, max_step_rows=32)
    running: list[tuple[CachedSequence, list[int]]] = []
    for kind, length, room in actions:
        prompt = ids(length, kind % 3)
        free = cache.free_pages
        try:
            running.append((cache.open(prompt, length + room), ids(length + room, kind % 3)))
        except OutOfPages:
            assert -(-(length + room) // 16) > free
        if kind == 5 and running:
            cache.close(running.pop(0)[0])
        for sequence, tokens in running:
            upto = min(len(tokens), sequence.computed_len + 20)
            if upto > sequence.computed_len:
                RaggedBatch.build([(sequence, tokens[sequence.computed_len : upto], sequence.computed_len)])
                cache.commit(sequence, tokens, upto)
    for sequence, tokens in running:
        compute(cache, sequence, tokens, 32)
        cache.close(sequence)
    assert cache.free_pages == cache.total_pages == 24
