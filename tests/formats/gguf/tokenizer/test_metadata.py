"""Folders of every kind of tokenizer become metadata, or are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tokenizers_of_each_kind import (
    END,
    byte_level,
    character_map,
    isolating,
    save,
    sentencepiece,
    unigram,
)
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer import TokenizerMetadata, tokenizer_metadata
from llmopt.formats.gguf.tokenizer.vocabulary import TokenType

KEY = "tokenizer.ggml."
LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
T5_NAMES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SPACES = character_map({"\n": " ", "\t": " ", "\r": " "})


def value(found: TokenizerMetadata, key: str) -> object:
    return found.values[KEY + key].value


def test_tokens_stand_in_the_order_of_their_ids(tmp_path: Path) -> None:
    tokenizer = byte_level(use_regex=True, size=700, special=(END, "<|im_start|>"))
    tokenizer.add_tokens([AddedToken("[user defined]", special=False, normalized=False)])
    found = tokenizer_metadata(save(tokenizer, tmp_path), 703)
    texts, types = found.values[KEY + "tokens"].value, found.values[KEY + "token_type"].value
    assert isinstance(texts, tuple) and isinstance(types, tuple | list)
    assert [tokenizer.token_to_id(text) for text in texts[:701]] == list(range(701))
    assert texts[701:] == ("[PAD701]", "[PAD702]")
    wanted = {END: "CONTROL", "<|im_start|>": "CONTROL", "[user defined]": "USER_DEFINED"}
    for text, kind in zip(texts, types, strict=True):
        normal = "UNUSED" if text.startswith("[PAD") else "NORMAL"
        assert TokenType(kind).name == wanted.get(text, normal), text
    assert value(found, "model") == "gpt2" and value(found, "pre") == "gpt-2"
    assert "2 rows of the embedding have no token; placeholders were written" in found.notes
    merges = value(found, "merges")
    assert isinstance(merges, tuple) and merges[0] == "Ġ Ġ" and len(merges) == 700 - 258


def test_a_token_outside_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="the model's embedding 699 rows"):
        tokenizer_metadata(save(byte_level(use_regex=True, size=700), tmp_path), 699)


@pytest.mark.parametrize(
    ("prefix", "adds"), [("prepend", True), ("metaspace", True), ("none", False)]
)
def test_byte_fallback_becomes_a_sentencepiece_model(
    prefix: str, adds: bool, tmp_path: Path
) -> None:
    folder = save(sentencepiece(prefix, size=1000), tmp_path, **LLAMA_NAMES)
    found = tokenizer_metadata(folder, 1000)
    assert (value(found, "model"), value(found, "add_space_prefix")) == ("llama", adds)
    types = found.values[KEY + "token_type"].value
    assert isinstance(types, tuple | list)
    assert [TokenType(kind).name for kind in types[:3]] == ["UNKNOWN", "CONTROL", "CONTROL"]
    assert {TokenType(kind) for kind in types[3:259]} == {TokenType.BYTE}
    assert [value(found, f"{name}_token_id") for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    spaced = any("begins with white space" in note for note in found.notes)
    beside = any("beside special tokens" in note for note in found.notes)
    assert spaced == beside == (prefix == "metaspace")


def test_merges_that_scores_cannot_express_are_refused(tmp_path: Path) -> None:
    tokenizer = sentencepiece("prepend", size=1000)
    model = json.loads(tokenizer.to_str())["model"]
    the = [pair for pair in model["merges"] if "".join(pair) == "▁the"]
    assert the
    merges = [tuple(pair) for pair in model["merges"] if pair not in the]
    tokenizer.model = models.BPE(
        model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    with pytest.raises(BadInputError, match="would not tokenize as this tokenizer does"):
        tokenizer_metadata(save(tokenizer, tmp_path, **LLAMA_NAMES), 1000)


def test_missing_byte_tokens_are_refused(tmp_path: Path) -> None:
    model = models.BPE({"<unk>": 0, "a": 1, "▁": 2}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(BadInputError, match="no token <0x00>"):
        tokenizer_metadata(save(tokenizer, tmp_path, eos_token="<unk>"), 3)


@pytest.mark.parametrize("charsmap", [b"", SPACES], ids=["plain", "as T5's"])
def test_unigram_becomes_t5s_model(charsmap: bytes, tmp_path: Path) -> None:
    folder = save(unigram(size=800, charsmap=charsmap), tmp_path, **T5_NAMES)
    found = tokenizer_metadata(folder, 800)
    assert value(found, "model") == "t5"
    assert value(found, "remove_extra_whitespaces") == bool(charsmap)
    assert (KEY + "precompiled_charsmap" in found.values) == bool(charsmap)
    if charsmap:
        assert bytes(value(found, "precompiled_charsmap")) == charsmap  # type: ignore[call-overload]


def test_unigram_that_falls_back_to_bytes_is_refused(tmp_path: Path) -> None:
    tokenizer = unigram(size=800)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    tokenizer.model = models.Unigram([tuple(piece) for piece in vocabulary], 2, True)
    with pytest.raises(BadInputError, match="falls back to bytes"):
        tokenizer_metadata(save(tokenizer, tmp_path, **T5_NAMES), 800)


def test_other_models_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BadInputError, match="a WordLevel model"):
        tokenizer_metadata(save(tokenizer, tmp_path, eos_token="a"), 2)


def test_what_the_class_puts_in_the_files_place_counts(tmp_path: Path) -> None:
    """AutoTokenizer gives Qwen2's folders Qwen2's own pre-tokenizer, whatever the file says."""
    save(byte_level(use_regex=True, size=700), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    found = tokenizer_metadata(tmp_path, 900)
    assert value(found, "pre") == "qwen2"
    assert any("Qwen2Tokenizer puts its own definition" in note for note in found.notes)


def test_tokens_that_a_class_adds_get_no_id(tmp_path: Path) -> None:
    """Gemma's class adds <pad> and <mask>, though the model has no rows for them."""
    save(sentencepiece("none", size=1000), tmp_path, **LLAMA_NAMES)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    config["tokenizer_class"] = "GemmaTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    found = tokenizer_metadata(tmp_path, 1010)
    assert KEY + "padding_token_id" not in found.values
    assert value(found, "bos_token_id") == 1


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(BadInputError, match="could not be loaded"):
        tokenizer_metadata(tmp_path, 10)


def test_text_beside_tokens_that_strip_is_noted(tmp_path: Path) -> None:
    tokenizer = byte_level([isolating(r"\p{N}")], use_regex=True, size=700)
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    found = tokenizer_metadata(save(tokenizer, tmp_path), 701)
    assert any("beside special tokens" in note and "<|user|>" in note for note in found.notes)


@pytest.mark.parametrize(
    ("template", "adds_bos", "adds_eos"),
    [("$A", False, False), (f"{END} $A", True, False), (f"{END} $A {END}", True, True)],
)
def test_what_is_put_around_a_text(
    template: str, adds_bos: bool, adds_eos: bool, tmp_path: Path
) -> None:
    tokenizer = byte_level(use_regex=True, size=700)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    found = tokenizer_metadata(save(tokenizer, tmp_path), 700)
    assert (value(found, "add_bos_token"), value(found, "add_eos_token")) == (adds_bos, adds_eos)
    assert (KEY + "bos_token_id" in found.values) == adds_bos  # the folder names none


def test_two_tokens_before_a_text_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(use_regex=True, size=700)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} {END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    with pytest.raises(BadInputError, match="one token before a text"):
        tokenizer_metadata(save(tokenizer, tmp_path), 700)


def test_all_tokens_that_end_a_turn_are_named(tmp_path: Path) -> None:
    names = (END, "<|stop|>", "<|halt|>", "<|cease|>", "<|im_end|>", "<|fim_prefix|>")
    save(byte_level(use_regex=True, size=700, special=names), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 0, 1, 2, 3]}', "utf-8")
    found = tokenizer_metadata(tmp_path, 700)
    assert [value(found, f"{name}_token_id") for name in ("eos", "eot", "eom", "fim_pre")] == [
        0, 1, 2, 5,
    ]  # fmt: skip
    assert [note for note in found.notes if "also stops" in note] == [
        "the model also stops at '<|cease|>'; llama.cpp has no place to say so"
    ]


def test_an_end_of_text_is_found_or_stood_in_for(tmp_path: Path) -> None:
    save(byte_level(use_regex=True, size=700), tmp_path, eos_token=None)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "model_type": "llama"}', "utf-8")
    assert value(tokenizer_metadata(tmp_path, 701), "eos_token_id") == 7
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    found = tokenizer_metadata(tmp_path, 701)
    assert value(found, "eos_token_id") == 700
    assert any("names a token that ends a text" in note for note in found.notes)
    with pytest.raises(BadInputError, match="names a token that ends a text"):
        tokenizer_metadata(tmp_path, 700)


def test_chat_templates_are_carried_by_name(tmp_path: Path) -> None:
    save(byte_level(use_regex=True, size=700), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    found = tokenizer_metadata(tmp_path, 700)
    assert found.values["tokenizer.chat_template"].value == "{{ messages }}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}", "utf-8")
    found = tokenizer_metadata(tmp_path, 700)
    assert found.values["tokenizer.chat_template"].value == "{{ messages }}"
    assert found.values["tokenizer.chat_templates"].value == ("tools",)
    assert found.values["tokenizer.chat_template.tools"].value == "{{ tools }}"
