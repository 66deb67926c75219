"""Tiny random targets, saved as Hugging Face directories so that the real loaders read them."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

VOCAB = 512


def save_tokenizer(directory: Path, vocab: int = VOCAB) -> None:
    """A byte-level tokenizer: pad 0, eos 1, bos 2, the 256 bytes, then filler words up to `vocab` ids."""
    specials = ["<pad>", "<eos>", "<bos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*specials, *alphabet][:vocab]
    words += [f"<w{i}>" for i in range(len(words), vocab)]
    tokenizer = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair=None, special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    facts = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(facts))


def save_gemma3(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Gemma 3 text model with sliding layers (window 32) and full ones."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    config = transformers.Gemma3TextConfig(**(settings | changes))
    return _save(transformers.Gemma3ForCausalLM, config, directory, seed, dtype)


def save_qwen3(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random dense Qwen3: grouped queries, q/k norms, separate head unless `tie_word_embeddings`."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    config = transformers.Qwen3Config(**(settings | changes))
    return _save(transformers.Qwen3ForCausalLM, config, directory, seed, dtype)


def _save(kind: Any, config: Any, directory: Path, seed: int, dtype: torch.dtype) -> Path:
    torch.manual_seed(seed)
    model = kind(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # random norms, so that a forgotten one shows
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory)
    save_tokenizer(directory, config.vocab_size)
    return directory
