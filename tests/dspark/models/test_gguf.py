"""GGUF files: loaded directly, converted, and broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file
from support import tiny
from support.targets import load, new_cache, prefill, random_ids
from tokenizers import Tokenizer, pre_tokenizers

from dspark.errors import ConfigError, ModelFileError
from dspark.models.convert import convert_gguf
from dspark.models.gguf import GgufSource

GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm", "pre_feedforward_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str, architecture: str) -> str:
    parts = name.removesuffix(".weight").removeprefix("model.").split(".", 2)
    layer, inner = (f"blk.{parts[1]}.", parts[2]) if parts[0] == "layers" else ("", ".".join(parts))
    if inner == "post_attention_layernorm":
        return f"{layer}{'post_attention_norm' if architecture == 'gemma3' else 'ffn_norm'}.weight"
    return f"{layer}{GGUF_NAMES[inner]}.weight"


def write_gguf(directory: Path, path: Path, *, quantised: bool = False, without: tuple[str, ...] = ()) -> Path:
    """The tiny model in `directory` as llama.cpp's converter would write it."""
    config = json.loads((directory / "config.json").read_text())
    architecture = {"gemma3_text": "gemma3", "qwen3": "qwen3"}[config["model_type"]]
    writer = GGUFWriter(path, architecture)
    add_metadata(writer, config, architecture, without)
    for name, tensor in load_file(directory / "model.safetensors").items():
        values = tensor.numpy()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1  # a new array: the file's own is not writable
        if quantised and values.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name, architecture), quantize(values, kind), raw_dtype=kind)
        elif name not in without:
            writer.add_tensor(gguf_name(name, architecture), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: GGUFWriter, config: dict[str, Any], architecture: str, without: tuple[str, ...]) -> None:
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    if "block_count" not in without:
        writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_context_length(config["max_position_embeddings"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
    add_tokenizer(writer, config["vocab_size"])


def add_tokenizer(writer: GGUFWriter, vocab: int) -> None:
    words = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    words += [f"<w{i}>" for i in range(len(words), vocab)]
    control = {"<pad>", "<eos>", "<bos>"}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([TokenType.CONTROL if word in control else TokenType.NORMAL for word in words])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)


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
