"""Checkpoints: published ones load unchanged, ours come back as written, broken ones say what is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.drafters import BLOCK, published_config, save_published

from dspark.errors import ModelFileError
from dspark.models.config import read_config
from dspark.models.drafters import DrafterConfig, DSparkDrafter, load_drafter, save_drafter
from dspark.models.drafters.base import rows_of_tokens
from dspark.models.drafters.checkpoint import target_tensors
from dspark.models.drafters.config import parse_drafter_config, to_json

CPU = torch.device("cpu")
DRAFT_IDS = torch.tensor([1, 2, 7, 8, 9, 100, 300, 511])


def load(path: Path, target: Path | None = None) -> DSparkDrafter:
    drafter = load_drafter(path, target_path=target, dtype=torch.float32, device=CPU)
    assert isinstance(drafter, DSparkDrafter)
    return drafter


def own_config(target: Path) -> DrafterConfig:
    facts = read_config(target)
    return DrafterConfig(
        block_size=BLOCK,
        target_layer_ids=(-1, 1),
        vocab_size=facts.vocab_size,
        draft_vocab_size=len(DRAFT_IDS),
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_layers=2,
        num_heads=facts.num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        num_target_layers=facts.num_layers,
        markov_rank=4,
        learned_mask=True,
        fc_bias=True,
        normalize_inputs=True,
        embedding_scale=8.0,
        hidden_act="gelu_pytorch_tanh",
        rope_thetas=(10_000.0, 1_000_000.0),
        name="small",
    )


def own_drafter(target: Path, seed: int = 0) -> DSparkDrafter:
    torch.manual_seed(seed)
    config = own_config(target)
    embed, head = target_tensors(target, config.vocab_size, config.hidden_size, torch.float32)
    d2t = DRAFT_IDS - torch.arange(len(DRAFT_IDS))
    drafter = DSparkDrafter(config, embed_weight=embed, head_weight=head[DRAFT_IDS], d2t=d2t)
    for parameter in drafter.parameters():
        parameter.data.copy_(torch.randn_like(parameter).bfloat16())
    return drafter.eval().requires_grad_(requires_grad=False)


def test_own_layout_comes_back_as_written(tiny_gemma: Path, tmp_path: Path) -> None:
    drafter = own_drafter(tiny_gemma)
    save_drafter(drafter, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(stored)
    assert stored["t2d"].nonzero()[:, 0].tolist() == DRAFT_IDS.tolist()
    again = load(tmp_path, tiny_gemma)
    assert again.config == drafter.config
    assert again.info == drafter.info
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    hidden = torch.randn(3, again.config.hidden_size)
    assert torch.equal(again.base_logits(hidden), drafter.base_logits(hidden))
    assert set(again.tap_tensors()) == {"fc.weight", "fc.bias", "hidden_norm.weight"}


def test_tokens_outside_the_draft_vocabulary_share_a_row(tiny_gemma: Path) -> None:
    rows = rows_of_tokens(DRAFT_IDS - torch.arange(len(DRAFT_IDS)), tiny.VOCAB)
    assert rows[DRAFT_IDS].tolist() == list(range(len(DRAFT_IDS)))
    assert set(rows.tolist()) == set(range(len(DRAFT_IDS) + 1))
    drafter = own_drafter(tiny_gemma)
    one, other = drafter.head.previous(torch.tensor([0, 3])), drafter.head.previous(torch.tensor([1, 1]))
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_config_survives_a_round_trip(tiny_gemma: Path) -> None:
    config = own_config(tiny_gemma)
    assert parse_drafter_config(to_json(config), source="config.json") == config
    plain = replace(config, draft_vocab_size=config.vocab_size, learned_mask=False, markov_head_type="rnn")
    assert parse_drafter_config(to_json(plain), source="config.json") == plain


def test_published_layout_needs_no_target(tmp_path: Path) -> None:
    tensors = save_published(tmp_path)
    drafter = load(tmp_path)
    assert torch.equal(drafter.embed_weight, tensors["embed_tokens.weight"])
    assert torch.equal(drafter.head_weight, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"block_size": 0}, "block_size"),
        ({"markov_head_type": "lstm"}, "markov_head_type"),
        ({"target_layer_ids": [0, 4]}, "target_layer_ids"),
        ({"target_layer_ids": []}, "target_layer_ids"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"sliding_window": 64, "use_sliding_window": True}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"draft_vocab_size": 97}, "draft_vocab_size"),
        ({"num_key_value_heads": 3}, "do not fit"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_thetas": [1e4]}, "rope_thetas"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_bad_config_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError, match=words) as caught:
        parse_drafter_config(published_config(**changes), source="some/config.json")
    assert "some/config.json" in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    tensors = save_published(tmp_path)
    weights = tmp_path / "model.safetensors"
    missing = {name: tensor for name, tensor in tensors.items() if name != "fc.weight"}
    for broken, words in (
        (missing, r"fc\.weight is missing"),
        ({**tensors, "fc.weight": torch.zeros(3, 3)}, r"fc\.weight has shape \(3, 3\)"),
        ({**tensors, "extra": torch.zeros(1)}, "unknown tensors: extra"),
        ({**tensors, "norm.weight": torch.ones(32, dtype=torch.int64)}, r"norm\.weight holds torch\.int64"),
        ({n: t for n, t in tensors.items() if n != "lm_head.weight"}, "the target's path is needed"),
    ):
        save_file(broken, weights)
        with pytest.raises(ModelFileError, match=words):
            load(tmp_path)
    weights.write_bytes(b"nothing of use")
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(ModelFileError, match="no such file"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"config\.json: no such file"):
        load(tmp_path)


def test_bad_draft_vocabulary_is_named(tiny_gemma: Path, tmp_path: Path) -> None:
    save_drafter(own_drafter(tiny_gemma), tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    for d2t, words in (
        (None, "d2t is missing"),
        (tensors["d2t"][:-1].contiguous(), "d2t has shape"),
        (tensors["d2t"] + 1000, "does not map"),
        (tensors["d2t"] * 0 - torch.arange(8), "does not map"),
    ):
        save_file({n: t for n, t in tensors.items() if n != "d2t"} | ({} if d2t is None else {"d2t": d2t}), weights)
        with pytest.raises(ModelFileError, match=words):
            load(tmp_path, tiny_gemma)


def test_target_of_other_shape_is_refused(tiny_gemma: Path, tmp_path: Path) -> None:
    save_drafter(own_drafter(tiny_gemma), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    with pytest.raises(ModelFileError, match="shape"):
        load(tmp_path, tiny_gemma)
