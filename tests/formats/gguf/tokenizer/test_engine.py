"""llama.cpp's tokenizers, written again: hand-made cases, and the tokenizers library as judge."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers_of_each_kind import byte_level, character_map, sentencepiece

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.byte_level import byte_level as as_byte_level
from llmopt.formats.gguf.tokenizer.charsmap import CharacterMap
from llmopt.formats.gguf.tokenizer.definition import define
from llmopt.formats.gguf.tokenizer.engine import (
    Engine,
    byte_characters,
    compile_splits,
    join_symbols,
    split_words,
    unigram,
)
from llmopt.formats.gguf.tokenizer.sentencepiece import sentencepiece as as_sentencepiece
from llmopt.formats.gguf.tokenizer.vocabulary import TokenType, Vocabulary

GPT2 = define(byte_level(use_regex=True))
GPT2_ENGINE = as_byte_level(GPT2, 900).engine
LLAMA = define(sentencepiece("prepend"))
LLAMA_ENGINE = as_sentencepiece(LLAMA, 1200).engine
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\x1c\x1d\x1e\x1f")


@settings(max_examples=300, deadline=None)
@given(st.text(CHARACTERS))
def test_byte_level_bpe_is_the_librarys(text: str) -> None:
    assert GPT2_ENGINE.encode(text) == GPT2.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.sampled_from(" theinorsad.▁\n"), CHARACTERS)))
def test_scores_from_merges_give_the_librarys_bpe(text: str) -> None:
    assert LLAMA_ENGINE.encode(text) == LLAMA.encode(text)


def test_the_lowest_rank_joins_first_and_the_leftmost_of_equals() -> None:
    ranks = {("a", "a"): 1, ("aa", "a"): 2, ("a", "b"): 0}
    assert join_symbols("aaaab", lambda left, right: ranks.get((left, right))) == ["aaa", "ab"]


def test_a_chain_cuts_what_the_last_left() -> None:
    chain = compile_splits([r"\p{N}", r"[a-z]+|\s+", r"(?=c)"])
    assert split_words("ab12 cc", chain) == ["ab", "1", "2", " ", "c", "c"]


def test_white_space_is_unicodes() -> None:
    chain = compile_splits([r"\s+"])
    assert split_words("a\u3000b\x1cc", chain) == ["a", "\u3000", "b\x1cc"]


def test_every_byte_has_a_character() -> None:
    assert len(set(byte_characters())) == 256
    assert (byte_characters()[ord(" ")], byte_characters()[ord("a")]) == ("Ġ", "a")


def test_the_longest_special_token_is_cut_out_first() -> None:
    vocabulary = Vocabulary(
        ("<a>", "<a><a>", "x"), (TokenType.CONTROL,) * 2 + (TokenType.NORMAL,), 0
    )
    engine = Engine.of(vocabulary, lambda text: [2] * len(text), space_prefix=True)
    assert engine.encode("x<a><a>xx<a>") == [2, 2, 1, 2, 2, 2, 0]
    assert engine.encode("") == []


def test_unigram_takes_the_best_way_and_one_unknown_for_many() -> None:
    texts = ("<unk>", "▁", "a", "b", "ab", "▁ab", "[user]")
    types = [TokenType.NORMAL] * 7
    types[0], types[6] = TokenType.UNKNOWN, TokenType.USER_DEFINED
    scores = [0.0, -2.0, -1.0, -1.0, -2.5, -4.0, 0.0]
    tokenize = unigram(
        Vocabulary(texts, tuple(types), 0),
        scores,
        0,
        CharacterMap.parse(b""),
        add_space_prefix=True,
        merge_spaces=False,
    )
    assert tokenize("ab") == [5]  # -4 against -2 -1 -1: the first of equals stays
    assert tokenize("aab") == [1, 2, 2, 3]
    assert tokenize("xyzb") == [1, 0, 3]


def test_a_character_map_rewrites_the_longest_prefix() -> None:
    charsmap = CharacterMap.parse(character_map({"\n": " ", "~": "<tilde>", "q": ""}))
    assert charsmap.apply("a~\nqué") == "a<tilde> ué"
    assert CharacterMap.parse(b"").apply("~") == "~"


@pytest.mark.parametrize("content", [b"\x04", b"\x04\0\0\0", b"\xff\xff\xff\x7f" + bytes(40)])
def test_a_damaged_character_map_is_refused(content: bytes) -> None:
    with pytest.raises(BadInputError, match="damaged"):
        CharacterMap.parse(content)
