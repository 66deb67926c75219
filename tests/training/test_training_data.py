"""Prompts: what is read, what is mixed, and which line is wrong."""

import json
from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.tokenizer import Tokenizer
from training.data import MAX_PROMPT, mixed_prompts, read_questions, standard_library


def test_questions_are_wrapped_and_keep_odd_separators(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = ["How many?", "One\u2028two\u0085three?"]
    path.write_text("".join(json.dumps({"turns": [turn]}, ensure_ascii=False) + "\n" for turn in turns))
    assert read_questions(path) == [f"Question: {turn}\nAnswer:" for turn in turns]


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": []}', '{"prompt": "x"}'])
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["fine"]}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_questions(path)


def test_mix_has_both_kinds_of_temperature_and_begins_with_bos(tiny_gemma: Path) -> None:
    tokenizer = Tokenizer((tiny_gemma / "tokenizer.json").read_bytes())
    prompts = mixed_prompts(tokenizer, [f"Question: {i} apples?\nAnswer:" for i in range(60)], 60, seed=1)
    assert prompts == mixed_prompts(tokenizer, [f"Question: {i} apples?\nAnswer:" for i in range(60)], 60, seed=1)
    assert all(prompt.token_ids[0] == 2 and len(prompt.token_ids) <= MAX_PROMPT for prompt in prompts)
    greedy = sum(prompt.temperature == 0 for prompt in prompts)
    assert len(prompts) // 3 < greedy <= len(prompts) // 2


def test_standard_library_is_python() -> None:
    texts = list(standard_library())
    assert len(texts) > 100
    assert max(map(len, texts)) <= 1500
