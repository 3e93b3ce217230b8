from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokenizers_of_each_kind import byte_level, sentencepiece, unigram
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llmopt.decoding.text.detokenizer import REPLACEMENT, Decoder, Detokenizer

TEXT = (
    "Hello  World, it's 12345.678!\n\n\tdef f(x): return x**2  # naïve café\n"
    "你好，世界。今天 Привет ١٢٣ ½ 🙂🙂👍🏽   DON'T 2024-11-21 http://a.b/c?d=e ᄀ 𝔘𝔫𝔦"
)
LETTERS = "ab é—你好🙂\n"
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(use_regex=True),
    "prepend": lambda: sentencepiece("prepend"),
    "metaspace": lambda: sentencepiece("metaspace"),
    "no prefix": lambda: sentencepiece("none"),
}


@cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    special = {"eos_token": "<|endoftext|>"} if kind == "byte-level" else {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=MAKERS[kind](), **special)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(tokenizer: Decoder, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer: Decoder, prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("repeats", [1, 12])
def test_the_pieces_join_to_the_text_wherever_the_prompt_ends(kind: str, repeats: int) -> None:
    tokenizer = make_tokenizer(kind)
    ids = encode(tokenizer, TEXT * repeats)
    whole = decode(tokenizer, ids)
    for cut in [0, 1, 2, *range(3, len(ids), 5 * repeats)]:
        pieces = pieces_of(tokenizer, ids[:cut], ids[cut:])
        before = decode(tokenizer, ids[:cut]).rstrip(REPLACEMENT)
        assert before + "".join(pieces) == whole
        assert not any(REPLACEMENT in piece for piece in pieces)
        assert pieces[-1] == ""


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=40)
@given(text=st.text(alphabet=LETTERS, max_size=60), cut=st.integers(0, 60))
def test_any_text_comes_out_as_it_went_in(kind: str, text: str, cut: int) -> None:
    tokenizer = make_tokenizer(kind)
    ids = encode(tokenizer, text)
    before = decode(tokenizer, ids[:cut]).rstrip(REPLACEMENT)
    pieces = pieces_of(tokenizer, ids[:cut], ids[cut:])
    assert before + "".join(pieces) == decode(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=150)
@given(data=st.data(), cut=st.integers(0, 20))
def test_any_tokens_of_a_byte_level_tokenizer_give_what_decoding_them_gives(
    data: st.DataObject, cut: int
) -> None:
    """Random models say bytes that are no text, for as long as one lets them."""
    tokenizer = make_tokenizer("byte-level")
    bytes_only = st.integers(1, 256)  # the alphabet's tokens follow the special one
    tokens = st.one_of(bytes_only, bytes_only, st.integers(0, len(tokenizer) - 1))
    ids = data.draw(st.lists(tokens, max_size=80))
    pieces = pieces_of(tokenizer, [], ids)
    assert "".join(pieces) == decode(tokenizer, ids)
    before = decode(tokenizer, ids[:cut])
    if not before.endswith(REPLACEMENT):  # or the prompt's broken end counts as generated, too
        assert before + "".join(pieces_of(tokenizer, ids[:cut], ids[cut:])) == decode(
            tokenizer, ids
        )


def test_bytes_that_form_no_character_are_shown_once_nothing_can_complete_them() -> None:
    tokenizer = make_tokenizer("byte-level")
    euro = encode(tokenizer, "€")[:1]
    assert decode(tokenizer, euro) == REPLACEMENT
    assert pieces_of(tokenizer, [], euro) == ["", REPLACEMENT]
    word = encode(tokenizer, "a")
    assert pieces_of(tokenizer, [], euro + word) == ["", REPLACEMENT + "a", ""]
    assert "".join(pieces_of(tokenizer, [], euro * 500)) == REPLACEMENT * 500


def test_byte_fallback_shows_what_follows_bytes_that_form_no_character() -> None:
    tokenizer = make_tokenizer("no prefix")
    broken = tokenizer.convert_tokens_to_ids("<0xE4>")
    ids = [*encode(tokenizer, "so 你"), *[broken] * 100, *encode(tokenizer, " and on")]
    text = "".join(pieces_of(tokenizer, [], ids))
    assert text.startswith("so ") and text.endswith(" and on") and REPLACEMENT in text


@pytest.mark.parametrize("kind", MAKERS)
def test_a_space_after_a_special_token_is_kept(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    words = encode(tokenizer, "so it is")
    end = tokenizer.eos_token_id
    prompt = [*words, *[end] * 12]
    expected = decode(tokenizer, prompt + words)[len(decode(tokenizer, prompt)) :]
    assert "".join(pieces_of(tokenizer, prompt, words)) == expected
    assert "".join(pieces_of(tokenizer, [], [*words, end, *words])) == decode(
        tokenizer, [*words, end, *words]
    )


def test_unigram_tokens_come_out_too() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram(), eos_token="</s>")
    ids = encode(tokenizer, "the quick brown fox jumps over the lazy dog " * 9)
    assert "".join(pieces_of(tokenizer, [], ids)) == decode(tokenizer, ids)
    joined = decode(tokenizer, ids[:7]) + "".join(pieces_of(tokenizer, ids[:7], ids[7:]))
    assert joined == decode(tokenizer, ids)


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer, self.num_decoded = tokenizer, 0

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        self.num_decoded += len(token_ids)
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )


@pytest.mark.parametrize("token", ["€", "word"])
def test_the_work_of_a_token_does_not_grow_with_the_text(token: str) -> None:
    """Even of a text that is one endless broken character."""
    tokenizer = make_tokenizer("byte-level")
    counting = CountingTokenizer(tokenizer)
    pieces_of(counting, [], encode(tokenizer, token)[:1] * 1000)
    assert counting.num_decoded < 50 * 1000
