"""Contexts in pages of common memory, and layers over them as one program: the same drafts, whatever memory does."""

import gc
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import kernels as choices
from support.drafting import attach, block_of, feed, item, key_of, make_any, make_engine, make_features
from torch import Tensor

from dspark.errors import OutOfPages
from dspark.kernels import team
from dspark.kernels.repeated import AtOnce, Layers
from services.draft.context import PAGE_SIZE, ContextRoom, KVShape
from services.draft.drafting import Drafted
from services.draft.engine import DraftEngine
from services.draft.pages import ContextPages, PagedKV

if not team.available():
    pytest.skip("this torch has no OpenMP that can be called", allow_module_level=True)

from dspark.kernels.repeated_llvm import Programs

SHAPE = KVShape(layers=2, kv_heads=2, head_dim=4, block_rows=8)
WHOLE: dict[str, Any] = {
    "hidden_size": 128,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 64,
    "intermediate_size": 128,
}
"""Products of whole groups of panels, as real drafters have."""


def rows(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = torch.randn(4, count, 2, 4, generator=torch.Generator().manual_seed(seed)).unbind()
    return [(made[0], made[1]), (made[2], made[3])]


def test_contexts_keep_their_rows_beside_each_other() -> None:
    memory, wanted = ContextPages(SHAPE, 8_192), rows(100, 0)
    first = memory.open(1000)
    first.append(wanted, 0, 37)
    others = [memory.open(1000) for _ in range(8)]
    for number, other in enumerate(others):
        other.append(rows(900, number + 1), 0, 900)
    first.append(wanted, 37, 63)
    for layer, (keys, values) in enumerate(wanted):
        found = first.layer_rows(layer)[:, :, :100]
        assert torch.equal(found, torch.stack((keys, values)).transpose(1, 2))


def test_pages_of_a_context_that_is_gone_are_used_again() -> None:
    memory = ContextPages(SHAPE, 2_016)
    context = memory.open(10_000)
    assert isinstance(context, PagedKV)
    context.require(2_000)
    pages = set(context.pages)
    assert len(pages) == 2_008 // PAGE_SIZE + 1
    with pytest.raises(OutOfPages, match="all 2016 context positions"):
        memory.open(10_000)
    del context
    again = memory.open(10_000)
    assert isinstance(again, PagedKV)
    again.require(2_000)
    assert set(again.pages) == pages


def test_a_context_that_there_is_no_room_for_keeps_no_page() -> None:
    memory = ContextPages(replace(SHAPE, block_rows=20), 48)
    first = memory.open(100)
    with pytest.raises(OutOfPages):
        memory.open(100)  # takes the last page, and lacks another
    del first
    gc.collect()
    memory.open(100).require(28)


@pytest.mark.parametrize("block_rows", [1, 8, 15])
def test_what_is_promised_is_there(block_rows: int) -> None:
    """Contexts of any length, each in whole pages, until the room is full."""
    shape, room = replace(SHAPE, block_rows=block_rows), ContextRoom(500, block_rows)
    memory, held = ContextPages(shape, 500), []
    for max_len in (1, 16, 17, 100, 3, 250, 64, 1, 1, 1, 1):
        try:
            held.append(memory.open(room.reserve(max_len)))
        except OutOfPages:
            continue
        held[-1].require(max_len)
    assert room.free_pages == 0


def engine_of(architecture: str, *, repeated: bool) -> DraftEngine:
    kernels = choices.named("llvm")
    kernels = kernels if repeated else replace(kernels, repeated=AtOnce)
    changes = WHOLE | ({"num_layers": 1} if architecture == "eagle3" else {})
    return make_engine(make_any(architecture, **changes), kernels=kernels)


def same(one: Drafted, other: Drafted) -> bool:
    pairs = [*zip(one.logits, other.logits, strict=True), (one.tokens, other.tokens)]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("architecture", ["dspark", "dflash", "eagle3", "mtp"])
def test_drafts_keep_their_bits_while_others_come_and_go(architecture: str) -> None:
    engines = [engine_of(architecture, repeated=repeated) for repeated in (True, False)]
    features, own = make_features(900, hidden=128), key_of("own")
    for engine in engines:
        attach(engine, own)
        feed(engine, own, features[:40])
    for turn in range(12):
        other, older = key_of(str(turn)), key_of(str(turn - 4))
        drafted = []
        for engine in engines:
            attach(engine, other, max_len=900)
            feed(engine, other, features[: 300 + 50 * turn])
            engine.detach([older] if turn % 3 else [])
            drafted.append(engine.draft([item(own, 41 + turn, max_tokens=1 + turn % 5)]))
            assert engine.append_features([block_of(own, features, 40 + turn, 41 + turn)]) == []
        assert same(*drafted)


def test_a_block_s_layers_are_written_out_once_and_repeated_from_then_on() -> None:
    written = 0

    class Counting(Programs):
        def __call__(self, layers: Layers, x: Tensor, steps: Mapping[str, Any], key: Hashable) -> Sequence[Tensor]:
            def counted(x: Tensor, steps: Mapping[str, Any]) -> Sequence[Tensor]:
                nonlocal written
                written += 1
                return layers(x, steps)

            return super().__call__(counted, x, steps, key)

    engine = make_engine(make_any("dspark", **WHOLE), kernels=replace(choices.named("llvm"), repeated=Counting))
    attach(engine, key_of())
    feed(engine, key_of(), make_features(40, hidden=128))
    for _ in range(6):
        engine.draft([item(key_of(), 41)])
    assert written == 1
