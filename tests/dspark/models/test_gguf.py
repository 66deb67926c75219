"""GGUF files: loaded directly, converted, and broken."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from support import tiny
from support.gguf_files import write_gguf
from support.targets import load, new_cache, prefill, random_ids
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from dspark.errors import ConfigError, ModelFileError
from dspark.models.convert import check_beginning, convert_gguf
from dspark.models.gguf import GgufSource


@pytest.fixture
def gemma_dir(tmp_path: Path) -> Path:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]  # what llama.cpp takes for granted
    return tiny.save_gemma3(tmp_path / "gemma", layer_types=kinds)


def logits(path: Path) -> torch.Tensor:
    model = load(path)
    return model.logits(prefill(model, new_cache(model), random_ids(80, tiny.VOCAB))[1])


def test_gemma_directly(gemma_dir: Path, tmp_path: Path) -> None:
    path = write_gguf(gemma_dir, tmp_path / "gemma.gguf")
    assert torch.allclose(logits(path), logits(gemma_dir), atol=1e-4)
    model = load(path)
    assert (model.info.name, model.info.eos_token_ids, model.info.bos_token_id) == ("gemma", (1,), 2)
    assert model.config == load(gemma_dir).config


def test_qwen_directly(tiny_qwen: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_qwen, tmp_path / "qwen.gguf")
    assert torch.equal(logits(path), logits(tiny_qwen))
    assert load(path).config == load(tiny_qwen).config


def test_quantised_weights(tiny_qwen: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_qwen, tmp_path / "qwen.gguf", quantised=True)
    expected = logits(tiny_qwen)
    assert (logits(path) - expected).norm() < 0.05 * expected.norm()


def test_conversion(tiny_qwen: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_qwen, tmp_path / "qwen.gguf")
    heard: list[tuple[str, int, int]] = []
    directory = convert_gguf(path, tmp_path / "converted", report=lambda *progress: heard.append(progress))
    assert {what for what, _, _ in heard} == {"weights", "tokenizer"}
    stored = load_file(directory / "model.safetensors")
    for name, tensor in load_file(tiny_qwen / "model.safetensors").items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16)), name
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.encode("ab<eos>").tokens == ["ab", "<eos>"]
    assert load(directory).config == load(tiny_qwen).config
    with pytest.raises(ConfigError, match="exists already"):
        convert_gguf(path, directory)


def test_broken_files(tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFileError, match=r"x.gguf: not a readable GGUF file"):
        load(path)
    with pytest.raises(ModelFileError, match=r"x.gguf: metadata qwen3.block_count is missing"):
        load(write_gguf(tiny_qwen, path, without=("block_count",)))
    with pytest.raises(ModelFileError, match=r"x.gguf: tensor model.norm.weight is missing"):
        load(write_gguf(tiny_qwen, path, without=("model.norm.weight",)))
    whole = write_gguf(tiny_qwen, path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match=r"x.gguf: not a readable GGUF file"):
        load(path)
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileError, match="architecture 'llama' is not supported"):
        GgufSource(path)


def test_tokenizer_that_begins_texts_otherwise_than_the_file_says_is_refused(tiny_qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tiny_qwen / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(path))
    check_beginning(1, path)
    check_beginning(None, path)
    with pytest.raises(ModelFileError, match="pip install -U transformers"):
        check_beginning(2, path)
