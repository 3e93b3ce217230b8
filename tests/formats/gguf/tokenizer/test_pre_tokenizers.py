"""Pre-tokenizers are recognised by their definition and proven, or refused with the difference."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tokenizers_of_each_kind import byte_level, isolating, save
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer import TokenizerMetadata, tokenizer_metadata
from llmopt.formats.gguf.tokenizer.engine import split_words
from llmopt.formats.gguf.tokenizer.pre_tokenizers import GPT2_EXPRESSION, known_pre_tokenizers

SIZE = 900
TABLE: list[dict[str, Any]] = yaml.safe_load(
    resources.files("llmopt.formats.gguf.tokenizer")
    .joinpath("pre_tokenizers.yaml")
    .read_text("utf-8")
)["pre_tokenizers"]
APPROXIMATE = ("tekken", "gpt-4o", "granite-embed-multi-97m")
"""Rows where llama.cpp's expressions know no letter's case, which the definitions do."""
DEFINITIONS = [
    pytest.param(row["name"], definition, id=f"{row['name']}-{index}")
    for row in TABLE
    for index, definition in enumerate(row["definitions"])
]


def metadata(tokenizer: Tokenizer, folder: Path, **names: object) -> TokenizerMetadata:
    return tokenizer_metadata(save(tokenizer, folder, **names), SIZE)


def pre_of(tokenizer: Tokenizer, folder: Path) -> object:
    return metadata(tokenizer, folder).values["tokenizer.ggml.pre"].value


def steps_of(definition: Sequence[str]) -> list[pre_tokenizers.PreTokenizer]:
    punctuation = pre_tokenizers.Punctuation("contiguous")
    return [punctuation if step.startswith("punct") else isolating(step) for step in definition]


def expression_of(name: str) -> str:
    found: str = next(row for row in TABLE if row["name"] == name)["definitions"][0][0]
    return found


@pytest.mark.parametrize(("name", "definition"), DEFINITIONS)
def test_a_definition_is_recognised(name: str, definition: Sequence[str], tmp_path: Path) -> None:
    tokenizer = byte_level(steps_of(definition))
    if name in APPROXIMATE:
        with pytest.raises(BadInputError, match="first differs on"):
            metadata(tokenizer, tmp_path)
        return
    found = pre_of(tokenizer, tmp_path)
    rows = {row["name"]: row for row in TABLE}
    assert definition in rows[found]["definitions"]
    assert found == name or (found, name) == ("dbrx", "llama-bpe")  # by ignore_merges alone


@pytest.mark.parametrize(
    ("steps", "use_regex", "name"),
    [
        ([], True, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True)], True, "smollm"),
        ([isolating(GPT2_EXPRESSION)], False, "gpt-2"),
        (
            [pre_tokenizers.Split(Regex(expression_of("qwen2")), "removed", invert=True)],
            False,
            "qwen2",
        ),
    ],
)
def test_other_words_for_the_same(
    steps: list[pre_tokenizers.PreTokenizer], use_regex: bool, name: str, tmp_path: Path
) -> None:
    assert pre_of(byte_level(steps, use_regex=use_regex), tmp_path) == name


def test_a_definition_in_unknown_words_is_noted(tmp_path: Path) -> None:
    reworded = expression_of("qwen2").replace(r"\s+(?!\S)|\s+", r"\s+(?=\s|$)|\s+")
    found = metadata(byte_level([isolating(reworded)]), tmp_path)
    assert found.values["tokenizer.ggml.pre"].value == "qwen2"
    assert any("not one of those known for 'qwen2'" in note for note in found.notes)


def test_a_definition_that_llama_cpp_lacks_is_refused_with_the_text(tmp_path: Path) -> None:
    pairs_of_digits = expression_of("llama-bpe").replace("{1,3}", "{1,2}")
    with pytest.raises(BadInputError) as raised:
        metadata(byte_level([isolating(pairs_of_digits)]), tmp_path)
    told = raised.value.what
    assert pairs_of_digits in told and "'12' · '34' · '5'" in told and "12345.678" in told


def test_a_space_before_every_text_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    with pytest.raises(BadInputError, match="add_prefix_space"):
        metadata(tokenizer, tmp_path)


def test_a_step_without_a_counterpart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="UnicodeScripts"):
        metadata(byte_level([pre_tokenizers.UnicodeScripts()], use_regex=True), tmp_path)


@pytest.mark.parametrize("name", ["llama-bpe", "dbrx"])
def test_ignored_merges_decide_between_names(name: str, tmp_path: Path) -> None:
    trained = byte_level([isolating(expression_of("llama-bpe"))])
    trained.add_tokens(["unmergeable"])  # leaves the trained merges as they are
    tokenizer = with_unreachable(trained, ignore_merges=name == "llama-bpe")
    assert pre_of(tokenizer, tmp_path) == name


def test_ignored_merges_that_llama_cpp_cannot_keep_are_refused(tmp_path: Path) -> None:
    trained = byte_level([isolating(expression_of("qwen2"))])
    with pytest.raises(BadInputError, match="ignore_merges is True"):
        metadata(with_unreachable(trained, ignore_merges=True), tmp_path)


def test_ignored_merges_that_tell_nothing_are_passed_over(tmp_path: Path) -> None:
    trained = byte_level([isolating(expression_of("qwen2"))])
    vocabulary, merges = trained_model(trained)
    trained.model = models.BPE(vocabulary, merges, ignore_merges=True)
    assert pre_of(trained, tmp_path) == "qwen2"


def with_unreachable(tokenizer: Tokenizer, *, ignore_merges: bool) -> Tokenizer:
    """The tokenizer with a word that its merges do not make."""
    vocabulary, merges = trained_model(tokenizer)
    taken = vocabulary | {token.content: index for index, token in added(tokenizer).items()}
    vocabulary |= {"zqzqzq": max(taken.values()) - 1}
    tokenizer.model = models.BPE(
        {text: index for text, index in vocabulary.items() if text == "zqzqzq" or index < 890},
        [pair for pair in merges if vocabulary["".join(pair)] < 890],
        ignore_merges=ignore_merges,
    )
    return tokenizer


def trained_model(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def added(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    found: dict[int, AddedToken] = tokenizer.get_added_tokens_decoder()
    return found


def test_composing_is_noted_and_other_rewriting_refused(tmp_path: Path) -> None:
    tokenizer = byte_level([isolating(expression_of("qwen2"))])
    tokenizer.normalizer = normalizers.NFC()
    found = metadata(tokenizer, tmp_path)
    assert any("not in composed form (NFC)" in note for note in found.notes)
    tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(BadInputError, match="NFKC"):
        metadata(tokenizer, tmp_path)


def test_the_table_is_whole() -> None:
    rows = known_pre_tokenizers()
    assert len({row.name for row in rows}) == len(rows) == len(TABLE)
    for row in rows:
        assert "".join(split_words("It's  12 naïve\n\nwörds… 你好", row.chain)) == (
            "It's  12 naïve\n\nwörds… 你好"
        )
