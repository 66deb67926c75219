"""The target's states of texts: computed as served, kept within the bound, believed only when whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from dspark.devices import pick_numerics
from dspark.errors import ConfigError
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import KVCache
from dspark.models.target import TargetModel, load_target
from training.dataset import Texts, read_texts
from training.state_cache import StateCache, StateCaches, TextStates
from training.state_memory import StateMemory
from training.states import TargetStates, rms_normalise

LAYERS = (0, 2, 4)


def cache_of(directory: Path, texts: Texts, gigabytes: float, name: str = "a") -> StateCache:
    lengths = [len(ids) for ids in texts.token_ids]
    return StateCache(directory, {"of": name}, lengths, layers=3, width=64, gigabytes=gigabytes)


def test_batch_holds_the_targets_states(target: TargetModel, data_set: Path) -> None:
    texts = read_texts(data_set)
    batch = TargetStates(texts, target, LAYERS).batch([3, 0, 17])
    for row, text in enumerate([3, 0, 17]):
        ids = texts.token_ids[text].tolist()
        cache = KVCache(target.config, pages=16, dtype=target.kept_dtype, device=target.device)
        place = cache.open(ids, len(ids) + 1)
        forward = target.forward(RaggedBatch.build([(place, ids, 0)]), cache, capture=frozenset(LAYERS))
        captured = torch.stack([forward.captured[layer] for layer in LAYERS], 1)
        n, first = len(ids), texts.prompt_lengths[text]
        assert batch.token_ids[row, :n].tolist() == ids
        assert torch.equal(batch.hidden[row, :n], forward.hidden)
        assert torch.equal(batch.captured[row, :n], rms_normalise(captured, 1e-6))
        logz = torch.logsumexp(target.logits(forward.hidden[first:]).float(), -1)
        torch.testing.assert_close(batch.logz[row, first:n], logz, atol=1e-3, rtol=1e-4)


def test_a_loss_in_bfloat16_has_the_sum_of_what_it_computes_itself(tiny_gemma: Path, data_set: Path) -> None:
    own = pick_numerics("auto", "float32", torch.device("cpu"))
    target = load_target(tiny_gemma, dtype=own.dtype, device=torch.device("cpu"), kernels=own.kernels)
    texts = read_texts(data_set)
    batch = TargetStates(texts, target, LAYERS, dtype=torch.bfloat16).batch([3])
    assert batch.hidden.dtype == batch.captured.dtype == torch.bfloat16
    first, n = texts.prompt_lengths[3], len(texts.token_ids[3])
    logits = functional.linear(batch.hidden[0, first:n].float(), target.head_weight).bfloat16().float()
    torch.testing.assert_close(batch.logz[0, first:n], torch.logsumexp(logits, -1), atol=2e-3, rtol=1e-4)


def test_processes_begin_a_cache_together(tmp_path: Path) -> None:
    """Ten at once, several times; none finds half a cache, and what one keeps the others find."""
    script = (
        "import sys, torch; from pathlib import Path; from training.state_cache import StateCache, TextStates;"
        "number = int(sys.argv[2]); sys.stdin.read(1);"
        "caches = [StateCache(Path(sys.argv[1]) / str(i), {'of': 'a'}, [5] * 10, layers=3, width=64, gigabytes=1)"
        " for i in range(20)];"
        "states = TextStates(torch.ones(5, 3, 64).bfloat16(), torch.ones(5, 64).bfloat16(), torch.ones(5));"
        "[cache.put(number, states) for cache in caches]"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen([*command, str(number)], stdin=pipe, stderr=pipe) for number in range(10)]
    for one in running:
        assert one.stdin is not None
        one.stdin.close()  # all are waiting for this
    for one in running:
        with one:
            assert one.stderr is not None
            assert (one.stderr.read(), one.wait()) == (b"", 0)
    for i in range(20):
        cache = StateCache(tmp_path / str(i), {"of": "a"}, [5] * 10, layers=3, width=64, gigabytes=1)
        assert all(cache.get(number) is not None for number in range(10))


def test_what_is_kept_is_what_was_computed(target: TargetModel, data_set: Path, tmp_path: Path) -> None:
    texts = read_texts(data_set)
    first = TargetStates(texts, target, LAYERS, cache_of(tmp_path, texts, 0.1))
    fresh = first.batch([5, 6])
    again = TargetStates(texts, target, LAYERS, cache_of(tmp_path, texts, 0.1))
    found = again.batch([5, 6])
    assert (first.computed, again.computed) == (2, 0)
    for name in ("captured", "hidden", "logz", "token_ids"):
        assert torch.equal(getattr(found, name), getattr(fresh, name))


def test_cache_stays_within_its_bound(target: TargetModel, data_set: Path, tmp_path: Path) -> None:
    texts = read_texts(data_set)
    bytes_a_token = 2 * (4 * 64 + 2)
    room = sum(len(ids) for ids in texts.token_ids[:10]) * bytes_a_token + 100
    cache = cache_of(tmp_path, texts, room / 1e9)
    assert cache.kept == 10
    states = TargetStates(texts, target, LAYERS, cache)
    states.batch(range(20))
    states.batch(range(20))
    assert states.computed == 20 + 10
    assert (tmp_path / "states.bin").stat().st_size == cache.bytes <= room


def test_no_cache_at_all_writes_nothing(target: TargetModel, data_set: Path, tmp_path: Path) -> None:
    texts = read_texts(data_set)
    states = TargetStates(texts, target, LAYERS, cache_of(tmp_path, texts, 0))
    states.batch([0])
    assert not list(tmp_path.iterdir())


def test_broken_entry_is_computed_again(target: TargetModel, data_set: Path, tmp_path: Path) -> None:
    texts = read_texts(data_set)
    whole = TargetStates(texts, target, LAYERS, cache_of(tmp_path, texts, 0.1)).batch([2])
    words = np.memmap(tmp_path / "states.bin", np.int16, "r+")
    words[(len(texts.token_ids[0]) + len(texts.token_ids[1])) * (4 * 64 + 2) + 40] ^= 1
    words.flush()
    states = TargetStates(texts, target, LAYERS, cache_of(tmp_path, texts, 0.1))
    assert torch.equal(states.batch([2]).captured, whole.captured)
    assert states.computed == 1


def test_cache_of_other_states_is_thrown_away(data_set: Path, tmp_path: Path) -> None:
    texts = read_texts(data_set)
    cache = cache_of(tmp_path, texts, 0.1)
    n = len(texts.token_ids[0])
    cache.put(0, TextStates(torch.ones(n, 3, 64).bfloat16(), torch.ones(n, 64).bfloat16(), torch.ones(n)))
    assert cache_of(tmp_path, texts, 0.1).get(0) is not None
    assert cache_of(tmp_path, texts, 0.1, name="b").get(0) is None
    assert cache_of(tmp_path, texts, 0.1).get(0) is None  # the other one took its place
    assert cache.get(0) is not None  # who was using it keeps what is there, and for themselves alone
    again = cache_of(tmp_path, texts, 0.1)
    again.put(0, TextStates(torch.zeros(n, 3, 64).bfloat16(), torch.zeros(n, 64).bfloat16(), torch.zeros(n)))
    kept = cache.get(0)
    assert kept is not None
    assert torch.equal(kept.logz, torch.ones(n))


def test_unusable_place_is_one_clear_error(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state cache"):
        cache_of(tmp_path / "file", read_texts(data_set), 0.1)


def test_caches_of_several_data_sets_count_on(data_set: Path, tmp_path: Path) -> None:
    texts = read_texts(data_set)
    parts = [cache_of(tmp_path / name, texts, 0.1, name) for name in ("a", "b")]
    caches, n = StateCaches(parts), len(texts.token_ids[1])
    states = TextStates(torch.ones(n, 3, 64).bfloat16(), torch.ones(n, 64).bfloat16(), torch.ones(n))
    caches.put(len(texts) + 1, states)
    assert parts[0].get(1) is None
    assert parts[1].get(1) is not None
    assert caches.get(len(texts) + 1) is not None
    assert caches.get(1) is None


def test_memory_gives_back_what_it_was_given(target: TargetModel, data_set: Path) -> None:
    texts = read_texts(data_set)
    lengths = [len(ids) for ids in texts.token_ids]
    bytes_a_token = 2 * 4 * 64 + 4
    room = (sum(lengths[:10]) * bytes_a_token + 100) / 1e9
    memory = StateMemory(lengths, layers=3, width=64, gigabytes=room, device=torch.device("cpu"))
    assert memory.bytes == sum(lengths[:10]) * bytes_a_token
    assert memory.get(3) is None
    states = TargetStates(texts, target, LAYERS, memory)
    plain = TargetStates(texts, target, LAYERS)
    wide = max(lengths) + 3
    for rows in ([3, 0, 7], [3, 7, 11], [11, 12]):
        found, expected = states.batch(rows), plain.batch(rows)
        for name in ("captured", "hidden", "logz", "token_ids"):
            for row, text in enumerate(rows):
                ours, theirs = (getattr(batch, name)[row, : lengths[text]] for batch in (found, expected))
                assert torch.equal(ours, theirs)
    assert states.computed == 3 + 1 + 2  # texts 11 and 12 have no place
    assert not memory.has(11)
    together = memory.together([7, 3], wide)
    assert together.captured.shape == (2, wide, 3, 64)
    assert torch.equal(together.logz[1, : lengths[3]], plain.batch([3]).logz[0])


def test_filling_computes_what_the_memory_keeps_and_changes_no_batch(target: TargetModel, data_set: Path) -> None:
    texts = read_texts(data_set)
    lengths = [len(ids) for ids in texts.token_ids]
    room = sum(lengths[:10]) * (2 * 4 * 64 + 4) + 100
    memory = StateMemory(lengths, layers=3, width=64, gigabytes=room / 1e9, device=torch.device("cpu"))
    filled = TargetStates(texts, target, LAYERS, memory)
    filled.fill(range(len(texts)))
    assert filled.computed == 10
    found, fresh = filled.batch([3, 9, 12]), TargetStates(texts, target, LAYERS).batch([3, 9, 12])
    assert filled.computed == 11  # the one without a place
    for row, text in enumerate([3, 9, 12]):
        for name in ("captured", "hidden"):
            ours, theirs = getattr(found, name)[row, : lengths[text]], getattr(fresh, name)[row, : lengths[text]]
            torch.testing.assert_close(ours, theirs.bfloat16().to(ours.dtype), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(found.logz[row, : lengths[text]], fresh.logz[row, : lengths[text]])
