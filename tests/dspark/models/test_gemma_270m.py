"""The real Gemma 3 270M against transformers in float32, past its window of 512, and its rows' bits in bf16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.targets import Piece, load, new_cache, prefill, step
from tokenizers import Tokenizer

from dspark.models.pull import is_ready, model_path
from dspark.models.target import TargetModel

NAME = "gemma-3-270m"
LENGTHS = (5, 8, 13, 21, 30, 40, 55, 64, 65, 80, 100, 127, 129, 160, 200, 256, 400, 513, 900, 1500)
TOLERANCE = 1e-3
CHECKED = 4
"""Positions of a prompt whose logits over the whole vocabulary are compared; hidden states are compared everywhere."""

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not is_ready(NAME), reason=f"run `dspark models pull {NAME}` first"),
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Text of this repository, cut to length; no two begin alike."""
    root = Path(__file__).parents[3]
    text = "".join((root / name).read_text() for name in ("dspark/errors.py", "dspark/messages.py", "pyproject.toml"))
    ids = Tokenizer.from_file(str(model_path(NAME) / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return [[2, *ids[17 * n : 17 * n + length - 1]] for n, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model() -> TargetModel:
    return load(model_path(NAME))


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    with torch.inference_mode():
        yield transformers.AutoModelForCausalLM.from_pretrained(model_path(NAME), dtype=torch.float32)


def assert_agree(model: TargetModel, hidden: torch.Tensor, theirs: Any, expected: torch.Tensor) -> None:
    """Hidden rows against transformers' hidden rows of the same positions, and the logits of the last few."""
    assert (hidden - expected).abs().max() < TOLERANCE * expected.abs().max()
    ours, reference = model.logits(hidden[-CHECKED:]), theirs.lm_head(expected[-CHECKED:])
    assert (ours - reference).abs().max().item() < TOLERANCE
    assert torch.equal(ours.argmax(-1), reference.argmax(-1))


def test_against_transformers(model: TargetModel, theirs: Any, prompts: list[list[int]]) -> None:
    expected = [theirs.model(torch.tensor([ids])).last_hidden_state[0] for ids in prompts]
    cache = new_cache(model, pages=512)
    for ids, reference in zip(prompts, expected, strict=True):
        sequence, hidden = prefill(model, cache, ids, 512 if len(ids) % 2 else 100)
        assert_agree(model, hidden, theirs, reference)
        cache.close(sequence)
    for ids, reference in zip(prompts[-3:], expected[-3:], strict=True):
        sequence, hidden = prefill(model, cache, ids)
        assert len(hidden) <= 16 < len(ids)  # the rest came from the prefix cache
        assert_agree(model, hidden, theirs, reference[-len(hidden) :])
        cache.close(sequence)
    cache.drop_prefixes()
    pieces = [Piece(cache.open(ids, len(ids)), ids, 0) for ids in prompts[:16]]
    for rows, reference in zip(step(model, cache, pieces), expected[:16], strict=True):
        assert_agree(model, rows, theirs, reference)


def test_rows_keep_their_bits_in_bfloat16(prompts: list[list[int]]) -> None:
    model = load(model_path(NAME), torch.bfloat16)
    cache = new_cache(model, pages=512, prefix_cache=False)
    ids = prompts[-2]
    _, whole = prefill(model, cache, ids)
    sequence, pieces = prefill(model, cache, ids[:512], 100)
    assert torch.equal(whole[:512], pieces)
    others = [Piece(prefill(model, cache, p)[0], [5, 6, 7][: 1 + n % 3], len(p)) for n, p in enumerate(prompts[:7])]
    logits = model.logits(whole[512:520])
    for count in (1, 6):
        piece = Piece(sequence, ids[512 : 512 + count], 512)
        alone, together = step(model, cache, [piece])[0], step(model, cache, [*others, piece])[-1]
        assert torch.equal(alone, whole[512 : 512 + count])
        assert torch.equal(together, alone)
        assert torch.equal(model.logits(alone), logits[:count])
