"""Prompts: what is read, what is mixed, which line is wrong, and what must not be trained on."""

import json
from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.tokenizer import Tokenizer
from training.prompts import (
    Mix,
    content_hash,
    mixed,
    read_hashes,
    read_turns,
    refuse_evaluation,
    standard_library,
    templated,
)

# A question of the GSM8K test split, by Cobbe et al. 2021 (MIT licence), as it is asked when evaluating.
EVALUATED = (
    "Andy plants 90 geraniums and 40 fewer petunias that geraniums. How many flowers does he plant total?\n"
    "Please reason step by step, and put your final answer within \\boxed{}."
)


def write(path: Path, turns: list[str]) -> Path:
    path.write_text("".join(json.dumps({"turns": [turn]}, ensure_ascii=False) + "\n" for turn in turns))
    return path


def test_turns_keep_odd_separators(tmp_path: Path) -> None:
    turns = ["How many?", "One\u2028two\u0085three?"]
    assert read_turns(write(tmp_path / "prompts.jsonl", turns)) == turns
    assert templated("Why?", "qa") == "Question: Why?\nAnswer:"
    assert templated("Why?", "none") == "Why?"


@pytest.mark.parametrize("line", ["{", "[]", '{"turns": []}', '{"prompt": "x"}', '{"turns": [3]}', '{"turns": [" "]}'])
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"turns": ["fine"]}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_turns(path)


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl"):
        read_turns(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        read_turns(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.jsonl"):
        read_turns(tmp_path / "binary.jsonl")


def test_evaluation_prompts_are_refused_by_content(tmp_path: Path) -> None:
    hashes = read_hashes()
    assert len(hashes) > 500
    assert content_hash("  andy'S Plants ") == content_hash("Andy's\nplants")
    refuse_evaluation(tmp_path / "a", ["Something else entirely?"], hashes)
    with pytest.raises(ConfigError, match="prompt 2 is one that drafters are evaluated on"):
        refuse_evaluation(tmp_path / "a", ["fine", f"  {EVALUATED.upper()} "], hashes)


def test_mix_has_its_shares_and_follows_its_seed(tiny_gemma: Path) -> None:
    tokenizer = Tokenizer((tiny_gemma / "tokenizer.json").read_bytes())
    texts = [f"Question: {i} apples?\nAnswer:" for i in range(200)]
    mix = Mix(100, code=0.2, bare=0.1, temperatures=(0.0, 1.0), max_tokens=64, seed=3)
    prompts = mixed(tokenizer, texts, mix)
    assert prompts == mixed(tokenizer, texts, mix)
    assert len(prompts) == 100
    assert all(prompt.token_ids[0] == 2 and len(prompt.token_ids) <= 64 for prompt in prompts)
    bare = [prompt for prompt in prompts if prompt.token_ids == (2,)]
    assert len(bare) == 10
    assert {prompt.temperature for prompt in bare} == {1.0}  # else all would have the same response
    asked = {tuple(tokenizer.encode(text)) for text in texts}
    assert sum(prompt.token_ids in asked for prompt in prompts) == 70
    assert 25 < sum(prompt.temperature == 0 for prompt in prompts) < 65
    assert len({prompt.seed for prompt in prompts}) == 100


def test_standard_library_gives_heads_of_functions_and_tasks() -> None:
    texts = list(standard_library())
    assert len(texts) > 5000
    tasks = [text for text in texts if text.startswith("Question: Write a python function ")]
    assert len(tasks) > 1000
    assert sum(text.lstrip().startswith(("def ", "@")) for text in texts) > 5000
