"""Broken model files end in one readable line that names the file and what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.targets import load, new_cache, prefill, random_ids

from dspark.errors import ModelFileError
from dspark.models.config import FULL, SLIDING, RopeConfig, parse_config, read_config
from dspark.models.fingerprint import model_fingerprint

WEIGHTS = "model.safetensors"


@pytest.fixture
def model_dir(tiny_qwen: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen, tmp_path / "model"))


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def truncate(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data[: len(data) // 2])


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.update({name: tensor}))


def drop_tensor(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.pop(name))


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, **changes)


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "bad json": (write("config.json", "{"), "config.json: not readable as JSON"),
    "no object": (write("config.json", "[]"), "config.json: holds list, not a JSON object"),
    "unknown type": (set_config(model_type="llama"), "model_type 'llama' is not supported"),
    "no type": (set_config(model_type="absent"), "model_type None is not supported"),
    "no layers": (set_config(num_hidden_layers=0), "num_hidden_layers must be a positive integer, not 0"),
    "no vocabulary": (set_config(vocab_size="absent"), "vocab_size must be a positive integer, not None"),
    "text size": (set_config(hidden_size="64"), "hidden_size must be a positive integer, not '64'"),
    "head counts": (set_config(num_key_value_heads=3), "4 attention heads, 3 key/value heads, head_dim 16 do not fit"),
    "layer types": (set_config(layer_types=["full_attention"]), "layer_types must name 4 layers"),
    "bias": (set_config(attention_bias=True), "attention_bias = True is not supported"),
    "activation": (set_config(hidden_act="gelu"), "activation 'gelu' is not supported"),
    "yarn": (
        set_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "rope type 'yarn' is not supported",
    ),
    "no theta": (set_config(rope_parameters={"rope_type": "default"}), "rope_theta must be a positive number"),
    "eps": (set_config(rms_norm_eps=-1.0), "rms_norm_eps must be a positive number, not -1.0"),
    "quantised": (set_config(quantization_config={"bits": 4}), "quantised weights are not supported"),
    "bos": (set_config(bos_token_id="start"), "bos_token_id must be a token id or a list of them, not 'start'"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "model.safetensors: no such file"),
    "truncated": (truncate, "model.safetensors: not a readable safetensors file"),
    "not safetensors": (write(WEIGHTS, "pickled?"), "model.safetensors: not a readable safetensors file"),
    "missing tensor": (drop_tensor("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj.weight is missing"),
    "missing head": (drop_tensor("lm_head.weight"), "tensor lm_head.weight is missing"),
    "wrong shape": (
        set_tensor("model.layers.1.self_attn.q_norm.weight", torch.ones(8)),
        r"model.layers.1.self_attn.q_norm.weight has shape \(8,\); the config says \(16,\)",
    ),
    "wrong vocabulary": (set_config(vocab_size=100), r"embed_tokens.weight has shape .* says \(100, 64\)"),
    "integers": (
        set_tensor("model.norm.weight", torch.ones(64, dtype=torch.int64)),
        "model.norm.weight holds torch.int64, not floating-point numbers",
    ),
    "bad index": (write("model.safetensors.index.json", "{}"), "weight_map must map tensor names to file names"),
    "index leads out": (
        write("model.safetensors.index.json", '{"weight_map": {"x": "../other.safetensors"}}'),
        "'../other.safetensors' is not a plain file name",
    ),
    "missing shard": (
        write("model.safetensors.index.json", '{"weight_map": {"x": "model-00001.safetensors"}}'),
        "model-00001.safetensors: no such file",
    ),
    "index names what is not there": (
        write("model.safetensors.index.json", '{"weight_map": {"x": "model.safetensors"}}'),
        "tensor x is missing, though model.safetensors.index.json names this file for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files(case: str, model_dir: Path) -> None:
    damage, message = BROKEN[case]
    damage(model_dir)
    with pytest.raises(ModelFileError, match=message) as caught:
        load(model_dir)
    assert "\n" not in str(caught.value)
    assert str(model_dir) in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such model directory or GGUF file"):
        load(tmp_path / "model")


def test_sharded_directory_is_the_same_model(tiny_qwen: Path, tmp_path: Path) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(tiny_qwen, tmp_path)


def test_text_part_of_an_image_model(tiny_gemma: Path, tmp_path: Path) -> None:
    text = json.loads((tiny_gemma / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 7]}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(tiny_gemma / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert load(tmp_path).config.eos_token_ids == (1, 7)
    assert_same_logits(tiny_gemma, tmp_path)


def assert_same_logits(one: Path, other: Path) -> None:
    logits = []
    for path in (one, other):
        model = load(path)
        logits.append(model.logits(prefill(model, new_cache(model), random_ids(20, tiny.VOCAB))[1]))
    assert torch.equal(*logits)


def test_old_config_layout(tiny_qwen: Path, tiny_gemma: Path) -> None:
    qwen = json.loads((tiny_qwen / "config.json").read_text())
    del qwen["rope_parameters"], qwen["layer_types"]
    old = parse_config({**qwen, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}, source="x")
    assert old.rope[FULL] == RopeConfig(1e6, 4.0)
    assert old.layer_types == (FULL,) * 4
    assert old.sliding_window is None
    gemma = json.loads((tiny_gemma / "config.json").read_text())
    del gemma["rope_parameters"], gemma["layer_types"]
    old = parse_config({**gemma, "rope_theta": 5e5, "sliding_window_pattern": 3}, source="x")
    assert old.rope == {FULL: RopeConfig(5e5), SLIDING: RopeConfig(1e4)}
    assert old.layer_types == (SLIDING, SLIDING, FULL) * 2
    assert read_config(tiny_gemma).layer_types == old.layer_types


def test_end_of_sequence_ids_of_the_generation_config_come_first(model_dir: Path) -> None:
    write("generation_config.json", '{"eos_token_id": [5, 9]}')(model_dir)
    assert read_config(model_dir).eos_token_ids == (5, 9)


def test_fingerprint_knows_weights_and_config_alone(model_dir: Path) -> None:
    before = model_fingerprint(model_dir)
    (model_dir / "tokenizer.json").write_text("{}")
    assert model_fingerprint(Path(shutil.move(model_dir, model_dir.parent / "moved"))) == before
    shutil.move(model_dir.parent / "moved", model_dir)
    edit_config(model_dir, rms_norm_eps=2e-6)
    assert model_fingerprint(model_dir) != before
    edit_config(model_dir, rms_norm_eps=1e-6)
    assert model_fingerprint(model_dir) == before
    set_tensor("model.norm.weight", torch.zeros(64))(model_dir)
    assert model_fingerprint(model_dir) != before
