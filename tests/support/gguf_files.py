"""Writing tiny models as GGUF files, the way llama.cpp's converter does."""

import json
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

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
