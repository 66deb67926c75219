"""Layers noted once and repeated: the very bits of running them as written, whatever ran in between."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor

from dspark.kernels import Kernels, team
from dspark.kernels.repeated import AtOnce, Layers
from dspark.models.batch import RaggedBatch
from dspark.models.kv_cache import KVCache
from dspark.models.target import Forward, TargetModel, load_target

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

from dspark.kernels.llvm_kernels import LLVM, ROUNDED, multiplies_bfloat16
from dspark.kernels.repeated_llvm import MOST_ROWS, Programs

CPU = torch.device("cpu")
CAPTURE = frozenset((-1, 0, 4))
WHOLE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2}  # products of whole panels, as real models have


class Counting(Programs):
    """Knows how often layers ran as written, and how often they were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.written = self.asked = 0

    def __call__(self, layers: Layers, x: Tensor, steps: Mapping[str, Any], key: Any) -> Sequence[Tensor]:
        def counted(x: Tensor, steps: Mapping[str, Any]) -> Sequence[Tensor]:
            self.written += 1
            return layers(x, steps)

        self.asked += 1
        return super().__call__(counted, x, steps, key)


class Twins:
    """A model that repeats and one that does not, over the same sequences. `wanted` is what a step captures."""

    def __init__(self, path: Path, own: Kernels = LLVM) -> None:
        self.programs = Counting()
        kernels = (replace(own, repeated=repeated) for repeated in (lambda: self.programs, AtOnce))
        self.models = [self._load(path, own) for own in kernels]
        self.caches = [self._cache(model) for model in self.models]
        self.sequences = [[cache.open([2] * 40, 2000) for _ in range(3)] for cache in self.caches]
        self.lengths = [0, 0, 0]

    @staticmethod
    def _load(path: Path, kernels: Any) -> TargetModel:
        return load_target(path, dtype=torch.float32, device=CPU, kernels=kernels)

    @staticmethod
    def _cache(model: TargetModel) -> KVCache:
        return KVCache(model.config, pages=400, dtype=model.kept_dtype, device=CPU, prefix_cache=False)

    def step(self, items: Sequence[tuple[int, Sequence[int]]], capture: frozenset[int] = CAPTURE) -> None:
        """Rows of some sequences, by number; fails where the two differ in a bit."""
        results: list[Forward] = []
        for model, cache, sequences in zip(self.models, self.caches, self.sequences, strict=True):
            batch = RaggedBatch.build([(sequences[n], list(ids), self.lengths[n]) for n, ids in items])
            results.append(model.forward(batch, cache, capture=capture))
        for n, ids in items:
            self.lengths[n] += len(ids)
            for sequences in self.sequences:
                sequences[n].computed_len = self.lengths[n]
        repeated, written = results
        assert torch.equal(repeated.hidden, written.hidden)
        assert repeated.captured.keys() == written.captured.keys()
        assert all(torch.equal(repeated.captured[layer], written.captured[layer]) for layer in written.captured)
        assert torch.isfinite(repeated.hidden).all()


@pytest.fixture(params=["gemma3", "qwen3"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Weights that bfloat16 holds."""
    if request.param == "gemma3":
        return tiny.save_gemma3(tmp_path, dtype=torch.bfloat16, **WHOLE)
    changes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 1}
    return tiny.save_qwen3(tmp_path, dtype=torch.bfloat16, num_hidden_layers=5, num_attention_heads=2, **changes)


KINDS = {"float32": LLVM, "float32 products": replace(LLVM, kept=torch.bfloat16), "bfloat16 products": ROUNDED}


@pytest.fixture(params=KINDS)
def twins(path: Path, request: pytest.FixtureRequest) -> Twins:
    """Over keys, values and products of either kind."""
    if KINDS[request.param] is ROUNDED and not multiplies_bfloat16():
        pytest.skip("no AVX512-BF16 instructions here")
    return Twins(path, KINDS[request.param])


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_bits_of_layers_as_written(twins: Twins) -> None:
    chance = random.Random(1)
    for n in range(3):
        twins.step([(n, [chance.randrange(3, 512) for _ in range(20 + 300 * n)])])
    for _ in range(60):
        some = chance.sample(range(3), chance.randint(1, 3))
        twins.step([(n, [chance.randrange(3, 512) for _ in range(chance.choice((1, 1, 2, 4)))]) for n in some])
    assert twins.programs.asked - twins.programs.written > 40
    assert twins.programs.written > 5


def test_rows_are_all_that_programs_differ_by(twins: Twins) -> None:
    """Whoever they belong to, and wherever: until a context outgrows its room."""
    for n, length in enumerate((20, 200, 90)):
        twins.step([(n, [5] * length)])
    written = twins.programs.written
    splits: tuple[tuple[int, ...], ...] = ((6,), (5, 1), (1, 5), (2, 2, 2), (4, 1, 1), (1, 2, 3))
    for split in splits:
        twins.step([(n, [7] * count) for n, count in enumerate(split)])
    assert twins.programs.written == written + 1


def test_a_context_that_outgrows_its_pages_and_scores(twins: Twins) -> None:
    chance = random.Random(2)
    for start in range(0, 1200, 300):
        for _ in range(4):
            twins.step([(0, [chance.randrange(3, 512)])])
        twins.step([(0, [chance.randrange(3, 512) for _ in range(296)])])
        assert twins.lengths[0] == start + 300
    assert twins.programs.asked > twins.programs.written


def test_what_is_left_in_memory_is_nobodys(twins: Twins) -> None:
    """Every program begins over what another left, here NaN."""
    for _ in range(6):
        twins.step([(0, [5])])
        twins.step([(1, [7, 8, 9])], capture=frozenset())
        twins.programs._memory._bytes.fill(0xFF)  # float32 NaN
    assert twins.programs.asked - twins.programs.written >= 6


def test_many_rows_run_as_written(twins: Twins) -> None:
    for _ in range(4):
        twins.step([(0, [3] * (MOST_ROWS + 1))])
    assert twins.programs.written == twins.programs.asked == 4


@pytest.mark.usefixtures("one_thread")
def test_another_number_of_threads_is_another_program(twins: Twins) -> None:
    for threads in (2, 1, 2, 1):
        torch.set_num_threads(threads)
        for _ in range(3):
            twins.step([(0, [4, 5])])
    assert (twins.programs.asked, twins.programs.written) == (12, 2)


def test_another_cache_is_another_program(twins: Twins) -> None:
    for _ in range(3):
        twins.step([(0, [4])])
    twins.caches = [twins._cache(model) for model in twins.models]
    twins.sequences = [[cache.open([2] * 40, 2000) for _ in range(3)] for cache in twins.caches]
    twins.lengths = [0, 0, 0]
    for _ in range(3):
        twins.step([(0, [4])])
    assert (twins.programs.asked, twins.programs.written) == (6, 2)


def test_layers_that_do_anything_else_are_never_repeated(tmp_path: Path) -> None:
    """Narrow products of two rows end in a copy by torch, which no program would make."""
    twins = Twins(tiny.save_gemma3(tmp_path, hidden_size=48))
    for _ in range(5):
        twins.step([(0, [9, 10])])
    assert twins.programs.written == twins.programs.asked == 5


def test_outputs_are_the_callers(twins: Twins) -> None:
    """What a step gave stays as it is while others run."""
    model, cache, sequence = twins.models[0], twins.caches[0], twins.sequences[0][0]
    kept: list[tuple[Tensor, Tensor]] = []
    for at in range(6):
        forward = model.forward(RaggedBatch.build([(sequence, [at + 3], at)]), cache, capture=CAPTURE)
        sequence.computed_len = at + 1
        kept += [(tensor, tensor.clone()) for tensor in (forward.hidden, *forward.captured.values())]
    assert twins.programs.asked - twins.programs.written == 5
    assert all(torch.equal(tensor, then) for tensor, then in kept)
