"""Targets agree with transformers in float32: logits to 1e-3, greedy tokens exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny
from support.targets import Piece, load, new_cache, prefill, random_ids, step

TOLERANCE = 1e-3

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma3": (tiny.save_gemma3, {}),
    "gemma3 grouped, odd window, scaled rope": (
        tiny.save_gemma3,
        {
            "num_key_value_heads": 2,
            "sliding_window": 37,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    ),
    "qwen3 grouped": (tiny.save_qwen3, {}),
    "qwen3 one to one, tied": (tiny.save_qwen3, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3 four to one": (
        tiny.save_qwen3,
        {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
}


@pytest.fixture(params=list(SHAPES))
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save, changes = SHAPES[request.param]
    saved: Path = save(tmp_path, **changes)
    return saved


def reference_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_whole_chunked_cached_and_verified(directory: Path) -> None:
    ids = random_ids(200, tiny.VOCAB)
    model = load(directory)
    cache = new_cache(model)
    expected = reference_logits(directory, ids)
    for piece in (512, 48, 7):
        sequence, hidden = prefill(model, cache, ids, piece)
        assert_agree(model.logits(hidden), expected[-len(hidden) :])
        assert len(hidden) == len(ids) if piece == 512 else len(hidden) < 64  # later ones meet the prefix cache
        cache.close(sequence)
    cold = new_cache(model, prefix_cache=False)
    sequence, hidden = prefill(model, cold, ids[:-8], 48)
    assert_agree(model.logits(hidden), expected[:-8])
    rows = step(model, cold, [Piece(sequence, ids[-8:], len(ids) - 8)])[0]
    assert_agree(model.logits(rows), expected[-8:])


def test_sixteen_ragged_sequences_in_one_batch(directory: Path) -> None:
    model = load(directory)
    cache = new_cache(model)
    prompts = [random_ids(length, tiny.VOCAB, seed=length) for length in range(9, 169, 10)]
    pieces = []
    for index, ids in enumerate(prompts):  # half of them have a part computed already
        done = len(ids) // 2 if index % 2 else 0
        sequence = prefill(model, cache, ids[:done], room=len(ids))[0] if done else cache.open(ids, len(ids))
        pieces.append(Piece(sequence, ids[done:], done))
    for piece, ids, rows in zip(pieces, prompts, step(model, cache, pieces), strict=True):
        assert_agree(model.logits(rows), reference_logits(directory, ids)[piece.start :])


def test_captured_layers_are_the_residual_stream(tiny_qwen: Path) -> None:
    from dspark.models.batch import RaggedBatch

    ids = random_ids(40, tiny.VOCAB)
    model = load(tiny_qwen)
    cache = new_cache(model)
    batch = RaggedBatch.build([(cache.open(ids, 64), ids, 0)])
    captured = model.forward(batch, cache, capture=frozenset({-1, 0, 2})).captured
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32)
    with torch.inference_mode():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert set(captured) == {-1, 0, 2}
    for layer, rows in captured.items():
        assert torch.allclose(rows, states[layer + 1][0], atol=1e-4)


def test_gemma_embedding_is_scaled(tiny_gemma: Path) -> None:
    model = load(tiny_gemma)
    ids = torch.tensor([5, 7])
    assert torch.allclose(model.embed_tokens(ids), model.embed_weight[ids] * 8.0)  # √64
    assert model.head_weight is model.embed_weight


def test_float32_of_a_bfloat16_file_widens_single_rows(tmp_path: Path) -> None:
    """The embedding, most of a small model's weights, stays mapped as it is."""
    narrow = load(tiny.save_gemma3(tmp_path, dtype=torch.bfloat16))
    ids = torch.tensor([5, 7])
    assert (narrow.dtype, narrow.embed_weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(narrow.embed_tokens(ids), narrow.embed_weight[ids].float() * 8.0)
    rows = torch.randn(3, 64)
    assert narrow.head_weight.dtype == torch.float32
    torch.testing.assert_close(narrow.logits(rows), rows @ narrow.embed_weight.float().T, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_near_float32(tiny_gemma: Path) -> None:
    ids = random_ids(100, tiny.VOCAB)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load(tiny_gemma, dtype)
        logits[dtype] = model.logits(prefill(model, new_cache(model), ids)[1]).float()
    error = (logits[torch.bfloat16] - logits[torch.float32]).norm() / logits[torch.float32].norm()
    assert error < 0.05
