"""Unigram (SentencePiece's other model) as llama.cpp's ``t5``, which any architecture may have."""

from __future__ import annotations

import base64
from collections.abc import Iterable

import numpy as np

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.candidate import PREFIX, Candidate, token_values
from llmopt.formats.gguf.tokenizer.charsmap import CharacterMap
from llmopt.formats.gguf.tokenizer.definition import Step, TokenizerDefinition
from llmopt.formats.gguf.tokenizer.engine import SPACE, Engine, unigram
from llmopt.formats.gguf.tokenizer.vocabulary import build_vocabulary
from llmopt.formats.gguf.values import TypedValue, ValueType, boolean, float32s, uint32

_NOTHING_LIKE_IT = "no GGUF file can tokenize as this model does; quantize to another format"


def unigram_model(definition: TokenizerDefinition, size: int) -> Candidate:
    """Everything that llama.cpp needs for a Unigram tokenizer.

    Args:
        definition: the tokenizer.
        size: rows of the embedding.

    Raises:
        BadInputError: byte fallback, no unknown token, or steps that llama.cpp has nothing like.
    """
    if definition.model.get("byte_fallback"):
        raise BadInputError(
            "the tokenizer is a Unigram model that falls back to bytes; llama.cpp's Unigram writes "
            "the unknown token instead",
            _NOTHING_LIKE_IT,
        )
    unknown = definition.model.get("unk_id")
    if unknown is None:
        raise BadInputError(
            "the tokenizer is a Unigram model without an unknown token, which llama.cpp needs",
            "name one in tokenizer.json (model.unk_id)",
        )
    vocabulary = build_vocabulary(definition, size, byte_tokens=False)
    scores = [0.0] * size
    for index, (_, score) in enumerate(definition.model["vocab"]):
        scores[index] = float(np.float32(score))  # as the file will hold it
    charsmap, merges_spaces = _normalization(definition.normalizers)
    prefix = _space_prefix(definition.pre_tokenizers)
    values = token_values("t5", "default", vocabulary)
    values[f"{PREFIX}scores"] = float32s(scores)
    values[f"{PREFIX}unknown_token_id"] = uint32(unknown)
    values[f"{PREFIX}add_space_prefix"] = boolean(prefix)
    values[f"{PREFIX}remove_extra_whitespaces"] = boolean(merges_spaces)
    if charsmap:
        values[f"{PREFIX}precompiled_charsmap"] = TypedValue(
            ValueType.ARRAY, tuple(charsmap), ValueType.UINT8
        )
    tokenize = unigram(
        vocabulary,
        scores,
        unknown,
        CharacterMap.parse(charsmap),
        add_space_prefix=prefix,
        merge_spaces=merges_spaces,
    )
    return Candidate(
        values=values,
        vocabulary=vocabulary,
        engine=Engine.of(vocabulary, tokenize),
        texts=tuple(piece.replace(SPACE, " ") for piece, _ in definition.model["vocab"]),
        composes=any(step["type"] == "NFC" for step in definition.normalizers),
        space_prefix=prefix or merges_spaces,
    )


def _normalization(steps: Iterable[Step]) -> tuple[bytes, bool]:
    """The character map, and whether runs of spaces become one."""
    charsmap, merges_spaces = b"", False
    for step in steps:
        if step["type"] == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
            merges_spaces = True
        elif step["type"] not in ("NFC", "Strip"):  # what these change is compared like other text
            raise _unknown_step("normalizer", step)
    return charsmap, merges_spaces


def _space_prefix(steps: Iterable[Step]) -> bool:
    prefix: bool | None = None
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE:
            prefix = step.get("prepend_scheme", "always") != "never"
        elif step["type"] != "WhitespaceSplit":
            raise _unknown_step("pre-tokenizer", step)
    if prefix is None:
        raise BadInputError(
            "the tokenizer is a Unigram model that does not write spaces as ▁, as llama.cpp does",
            _NOTHING_LIKE_IT,
        )
    return prefix


def _unknown_step(kind: str, step: Step) -> BadInputError:
    return BadInputError(
        f"the tokenizer's {kind} {dict(step)} has nothing like it in llama.cpp", _NOTHING_LIKE_IT
    )
