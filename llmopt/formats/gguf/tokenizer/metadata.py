"""From a tokenizer's folder to llama.cpp's tokenizer metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.byte_level import byte_level
from llmopt.formats.gguf.tokenizer.candidate import Candidate
from llmopt.formats.gguf.tokenizer.definition import (
    TokenizerDefinition,
    definition_of_class,
    load_tokenizers,
)
from llmopt.formats.gguf.tokenizer.probes import DECOMPOSED_LINES, LINES, SPACED_LINES
from llmopt.formats.gguf.tokenizer.proof import prove
from llmopt.formats.gguf.tokenizer.sentencepiece import sentencepiece
from llmopt.formats.gguf.tokenizer.special_tokens import special_tokens
from llmopt.formats.gguf.tokenizer.unigram import unigram_model
from llmopt.formats.gguf.values import TypedValue, string, strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenizerMetadata:
    """What a GGUF file says about its tokenizer.

    Attributes:
        values: of the keys ``tokenizer.*``, to be written as they are.
        notes: what a person should know: texts that llama.cpp tokenizes in another way, choices.
    """

    values: Mapping[str, TypedValue]
    notes: tuple[str, ...]


def tokenizer_metadata(folder: Path, vocabulary_size: int) -> TokenizerMetadata:
    """Express a model's tokenizer as llama.cpp has it, and prove that it does the same.

    The definition in ``tokenizer.json`` counts, unless the tokenizer class puts something else in
    its place: then the class's, with a note, since calibration and evaluation run the class.

    Args:
        folder: of the model: ``tokenizer.json`` and its companions.
        vocabulary_size: rows of the embedding; every row gets a token.

    Raises:
        BadInputError: llama.cpp cannot tokenize as this tokenizer does; says where it differs.
    """
    loaded, of_file = load_tokenizers(folder)
    definition, notes = _definition(loaded, of_file)
    candidate = _candidate(definition, vocabulary_size)
    differences = prove(definition, candidate)
    special = special_tokens(folder, loaded, candidate.vocabulary)
    values = {**candidate.values, **special.values, **_chat_templates(loaded)}
    unused = candidate.vocabulary.num_unused
    if unused:
        notes += (f"{unused} rows of the embedding have no token; placeholders were written",)
    return TokenizerMetadata(values, (*notes, *candidate.notes, *differences, *special.notes))


def _definition(
    loaded: PreTrainedTokenizerBase, of_file: TokenizerDefinition | None
) -> tuple[TokenizerDefinition, tuple[str, ...]]:
    """The definition that counts, and a note where the class overrules the file."""
    of_class = definition_of_class(loaded)
    if of_file is None:
        return of_class, ()
    for text in (*LINES, *SPACED_LINES, *DECOMPOSED_LINES):
        if of_file.encode(text) != of_class.encode(text):
            return of_class, (
                f"{type(loaded).__name__} puts its own definition in place of tokenizer.json's, "
                f"which differs on {text!r}; calibration and evaluation run the class, so that is "
                "what was written",
            )
    return of_file, ()


def _candidate(definition: TokenizerDefinition, size: int) -> Candidate:
    model = definition.model["type"]
    kinds = {step["type"] for step in definition.pre_tokenizers}
    if model == "BPE" and "ByteLevel" in kinds:
        return byte_level(definition, size)
    if model == "BPE" and _has_bytes(definition):
        return sentencepiece(definition, size)
    if model == "Unigram":
        return unigram_model(definition, size)
    raise BadInputError(
        f"the tokenizer is a {model} model"
        + (" that is neither byte-level nor falls back to bytes" if model == "BPE" else "")
        + ", which llmopt cannot express for llama.cpp",
        "byte-level BPE, BPE with byte fallback and Unigram are understood; quantize to another "
        "format",
    )


def _has_bytes(definition: TokenizerDefinition) -> bool:
    return bool(definition.model.get("byte_fallback"))


def _chat_templates(loaded: PreTrainedTokenizerBase) -> dict[str, TypedValue]:
    """The chat template, and others by their names (``tokenizer.chat_template.NAME``)."""
    given = loaded.chat_template
    if not given:
        return {}
    templates: dict[str, str] = {"default": given} if isinstance(given, str) else dict(given)
    values: dict[str, TypedValue] = {}
    if "default" in templates:
        values["tokenizer.chat_template"] = string(templates.pop("default"))
    if templates:
        values["tokenizer.chat_templates"] = strings(sorted(templates))
        values |= {
            f"tokenizer.chat_template.{name}": string(text)
            for name, text in sorted(templates.items())
        }
    return values
