"""What a file's own tokenizer does otherwise than the source's is told."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tokenizers_of_each_kind import byte_level, save

from llmopt.formats.gguf.tokenizer import tokenizer_metadata
from llmopt.formats.gguf.tokenizer.foreign import tokenizer_notes

SIZE = 700


def read_back(folder: Path) -> dict[str, Any]:
    """Metadata of a tokenizer as a reader gives it."""

    def plain(value: object) -> object:
        numbers = isinstance(value, tuple | list) and not isinstance(value[0], str)
        return np.asarray(value) if numbers else value

    values = tokenizer_metadata(folder, SIZE).values
    return {key: plain(value.value) for key, value in values.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(byte_level(use_regex=True, size=SIZE), tmp_path)


def test_the_sources_own_tokenizer_needs_no_word(folder: Path) -> None:
    assert tokenizer_notes(read_back(folder), folder, SIZE) == ()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pre", "llama-bpe", "the pre-tokenizer .* is 'llama-bpe' .* source's is 'gpt-2'"),
        ("pre", None, "the pre-tokenizer .* is not said"),
        ("model", "llama", "the kind of tokenizer .* is 'llama'"),
        ("eos_token_id", 3, "the token that ends one .* is 3 "),
        ("merges", ("a b",), "the merges .* are not the source's"),
        ("merges", None, "the merges .* are not the source's"),
    ],
)
def test_what_llama_cpp_would_do_otherwise_is_told(
    folder: Path, key: str, value: object, told: str
) -> None:
    metadata = read_back(folder)
    metadata[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    (note,) = tokenizer_notes(metadata, folder, SIZE)
    assert re.search(told, note), note
    assert "other tokens than those that were judged" in note


def test_a_tokenizer_that_llama_cpp_lacks_is_told_as_such(folder: Path) -> None:
    (note,) = tokenizer_notes({}, folder, SIZE - 1)
    assert note.startswith("the file's tokenizer was not compared: ")
