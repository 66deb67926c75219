"""Encoding, chat templates, and decoding token by token, over every kind of decoder that models use."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dspark.errors import InvalidRequest, ModelFileError
from dspark.tokenizer import IncrementalDetokenizer, Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁a", "a", "▁the", "re", ".", "�", "é", "́", "▁▁", "🙂", "‍", "x", "▁ x", "!"]
FACTS = {"bos_token_id": 0, "eos_token_ids": [1]}
REAL = Path.home() / ".cache/dspark/models/gemma-3-270m/tokenizer.json"


def vocabulary(*words: str) -> dict[str, int]:
    return {word: index for index, word in enumerate(dict.fromkeys(["<bos>", "<eos>", *words]))}


def finish(inner: tokenizers.Tokenizer, **facts: object) -> Tokenizer:
    inner.add_special_tokens(["<bos>", "<eos>"])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", pair=None, special_tokens=[("<bos>", 0)])
    return Tokenizer(inner.to_str().encode(), json.dumps(FACTS | facts).encode())


def gemma_like(**facts: object) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocabulary(*BYTES, *WORDS), [], byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finish(inner, **facts)


def llama_like() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocabulary(*BYTES, *WORDS), [], byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return finish(inner)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "ðâÃÌ" for b in alphabet[::9]]
    inner = tokenizers.Tokenizer(models.BPE(vocabulary(*alphabet, *(a + b for a, b in pairs)), pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return finish(inner)


def metaspace() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary("<unk>", *WORDS), unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return finish(inner)


def word_piece() -> Tokenizer:
    words = vocabulary("[UNK]", "do", "##n", "n't", ".", ",", "##'s", "we")
    inner = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    return finish(inner)


KINDS: dict[str, Tokenizer] = {
    make.__name__: make() for make in (gemma_like, llama_like, byte_level, metaspace, word_piece)
}


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    incremental = IncrementalDetokenizer(tokenizer)
    return [*(incremental.push(token_id) for token_id in ids), incremental.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_full_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, 300), max_size=30))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [gemma_like, llama_like, byte_level])
@given(text=st.text(max_size=20))
@settings(max_examples=80, deadline=None)
def test_no_piece_of_a_real_text_holds_half_a_character(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = KINDS[make.__name__]
    pieces = stream(tokenizer, list(tokenizer.encode(text)))
    assert "".join(pieces).removeprefix(" ") == text.removeprefix(" ")
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


def test_an_emoji_of_byte_tokens_arrives_whole() -> None:
    tokenizer = KINDS["gemma_like"]
    ids = [2 + byte for byte in "👍".encode()]
    pieces = stream(tokenizer, [*ids, tokenizer.encode("x", special_tokens=False)[0]])
    assert pieces == ["", "", "", "", "👍x", ""]


def test_unfinished_characters_come_at_the_end_as_replacements() -> None:
    tokenizer = KINDS["gemma_like"]
    assert stream(tokenizer, [2 + 0xF0, 2 + 0x9F])[-1] == "��"


def test_latin_text_is_not_held_back() -> None:
    vocabulary_ids = vocabulary(*BYTES, *WORDS)
    ids = [vocabulary_ids[word] for word in ("▁the", "re", "▁a", "▁", ".")]
    assert stream(KINDS["gemma_like"], ids) == [" the", "re", " a", " ", ".", ""]


def test_bos_is_added_as_the_post_processor_does() -> None:
    tokenizer = KINDS["gemma_like"]
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("a", special_tokens=False)[0] != 0
    assert tokenizer.encode("") == (0,)


async def test_long_texts_are_encoded_off_the_event_loop() -> None:
    tokenizer = KINDS["byte_level"]
    text = "some words " * 30_000
    ticks = []

    async def tick() -> None:
        while True:
            ticks.append(time.perf_counter())
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    ids = await tokenizer.encode_async(text)
    ticking.cancel()
    assert len(ids) == len(text) + 1
    longest = max(later - earlier for earlier, later in itertools.pairwise(ticks))
    assert longest < 0.5 * (time.perf_counter() - ticks[0])


TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    tokenizer = gemma_like(chat_template=TEMPLATE)
    text = tokenizer.render_chat([{"role": "user", "content": " hi "}, {"role": "assistant", "content": "{{ 1 }}"}])
    assert text == "<bos><user>hi<assistant>{{ 1 }}<assistant>"
    assert tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        (TEMPLATE, "no tools here"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{% for %}", "refuses"),
    ],
)
def test_chat_refusals_name_the_field(template: str | None, reason: str) -> None:
    tokenizer = gemma_like(chat_template=template)
    with pytest.raises(InvalidRequest, match=rf"prompt\.chat.*{reason}"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("tokenizer_json", "model_json"), [(b"{", b"{}"), (b"\xff", b"{}"), (None, b"["), (None, b"[]")]
)
def test_broken_files_are_named(tokenizer_json: bytes | None, model_json: bytes) -> None:
    good = tokenizers.Tokenizer(models.BPE({}, [])).to_str().encode()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json" if tokenizer_json else r"model\.json"):
        Tokenizer(tokenizer_json or good, model_json)


@pytest.mark.model
def test_gemma_text_survives_token_by_token() -> None:
    tokenizer = Tokenizer(REAL.read_bytes(), json.dumps({"bos_token_id": 2}).encode())
    text = "Olá 世界 👩‍👩‍👧‍👦 ṩ́ 𐍈\t\n  spaces   in rows\u200b ﷽ naïve 🇩🇪"
    ids = list(tokenizer.encode(text))
    assert ids[0] == 2
    assert "".join(stream(tokenizer, ids)) == text
