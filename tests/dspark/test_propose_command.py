"""`dspark propose` against an independent reading: transformers for the target, plain tensors for the drafter."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import drafters, tiny

from dspark.cli import main

PROMPTS = [[5], [7, 8, 9, 10], [(31 * i + 7) % 95 for i in range(700)]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("target")
    return tiny.save_qwen3(
        directory, vocab_size=drafters.VOCAB, hidden_size=drafters.HIDDEN, num_hidden_layers=5, head_dim=8
    )


def expected(target: Path, tensors: dict[str, torch.Tensor], head: str, prompt: Sequence[int]) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.inference_mode():
        out = model(torch.tensor([prompt]), output_hidden_states=True)
    captured = torch.stack([out.hidden_states[layer + 1][0] for layer in drafters.LAYER_IDS], 1)
    anchor = int(out.logits[0, -1].argmax())
    tokens, confidences, tops = drafters.PlainDrafter(tensors, head).draft(captured, anchor)
    return {"anchor": anchor, "tokens": tokens, "confidence_logits": confidences, "top1_logits": tops}


def propose(*arguments: str | Path) -> int:
    """Its exit status."""
    with pytest.raises(SystemExit) as ended:
        main(["propose", *map(str, arguments)])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def ids_file(directory: Path, content: object) -> Path:
    path = directory / "ids.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_blocks_are_those_of_an_independent_reading(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    tensors = drafters.save_published(tmp_path / "drafter", head)
    ids = ids_file(tmp_path, PROMPTS)
    assert propose("--target", target, "--drafter", tmp_path / "drafter", "--ids", ids, "--json") == 0
    blocks = json.loads(capsys.readouterr().out)
    assert len(blocks) == len(PROMPTS)
    for prompt, block in zip(PROMPTS, blocks, strict=True):
        wanted = expected(target, tensors, head, prompt)
        assert block.keys() == wanted.keys()
        assert (block["anchor"], block["tokens"]) == (wanted["anchor"], wanted["tokens"])
        assert block["confidence_logits"] == pytest.approx(wanted["confidence_logits"], abs=1e-4)
        assert block["top1_logits"] == pytest.approx(wanted["top1_logits"], abs=1e-4)


def test_without_json_it_is_for_reading(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafters.save_published(tmp_path / "drafter")
    assert propose("--target", target, "--drafter", tmp_path / "drafter", "--ids", ids_file(tmp_path, [[5, 6]])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "prompt 0 (2 tokens)"
    assert [line.split()[0] for line in lines[1:]] == ["anchor", "tokens", "confidence_logits", "top1_logits"]
    assert len(lines[2].split()) == 1 + drafters.BLOCK


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        ({"a": 1}, "expected a list of lists of token ids"),
        ([5, 6], "expected a list of lists of token ids"),
        ([[5], [6, "x"]], 'prompt 1 holds "x", which is no token id'),
        ([[True]], "prompt 0 holds true, which is no token id"),
        ([[]], "prompt 0 has 0 token ids, expected 1 to 4095"),
        ([[1], [2, 96]], "prompt 1: token id 96 is outside the vocabulary, 0 to 95"),
        ([[-1]], "prompt 0: token id -1 is outside the vocabulary, 0 to 95"),
    ],
)
def test_bad_ids_are_one_line(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, complaint: str
) -> None:
    drafters.save_published(tmp_path / "drafter")
    ids = tmp_path / "ids.json"
    if isinstance(content, bytes):
        ids.write_bytes(content)
    else:
        ids_file(tmp_path, content)
    assert propose("--target", target, "--drafter", tmp_path / "drafter", "--ids", ids) == 1
    assert complaint in one_line(capsys)


def test_what_cannot_be_read_is_one_line(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafters.save_published(tmp_path / "drafter")
    ids = ids_file(tmp_path, [[1]])
    cases = [
        (target, tmp_path / "drafter", tmp_path / "none.json", "No such file"),
        (target, tmp_path / "nowhere", ids, "nowhere"),
        (tmp_path / "nowhere", tmp_path / "drafter", ids, "nowhere"),
        (target, target, ids, "names no known drafter"),
    ]
    for target_path, drafter_path, ids_path, complaint in cases:
        assert propose("--target", target_path, "--drafter", drafter_path, "--ids", ids_path) == 1
        assert complaint in one_line(capsys)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vocab_size": 128}, "drafter vocabulary 96, target .* has 128"),
        ({"hidden_size": 48}, "drafter reads hidden size 32, target .* has 48"),
        ({"num_hidden_layers": 4}, "is for 5 layers, target .* has 4"),
        ({"num_hidden_layers": 3}, r"drafter reads layers \[0, 2\], target .* offers -1 to 1 of its 3"),
    ],
)
def test_a_drafter_for_another_target_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], complaint: str
) -> None:
    shapes: dict[str, Any] = {"vocab_size": drafters.VOCAB, "hidden_size": drafters.HIDDEN, "num_hidden_layers": 5}
    target = tiny.save_qwen3(tmp_path / "target", **(shapes | changes))
    drafters.save_published(tmp_path / "drafter")
    ids = ids_file(tmp_path, [[1]])
    capsys.readouterr()  # what saving the target said
    assert propose("--target", target, "--drafter", tmp_path / "drafter", "--ids", ids) == 1
    line = one_line(capsys)
    assert re.search(complaint, line), line


def test_a_drafter_of_another_fingerprint_is_refused(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafters.save_published(tmp_path / "drafter", target_model_fingerprint="0123abcd")
    ids = ids_file(tmp_path, [[1]])
    assert propose("--target", target, "--drafter", tmp_path / "drafter", "--ids", ids) == 1
    assert "is for the target with fingerprint 0123abcd, target" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    return line
