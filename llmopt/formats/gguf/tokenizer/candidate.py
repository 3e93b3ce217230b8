"""What is to be written for a tokenizer, with the engine that tells what llama.cpp makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.definition import TokenizerDefinition
from llmopt.formats.gguf.tokenizer.engine import Engine
from llmopt.formats.gguf.tokenizer.vocabulary import Vocabulary
from llmopt.formats.gguf.values import TypedValue, int32s, string, strings

PREFIX = "tokenizer.ggml."


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Metadata of one of llama.cpp's tokenizer models, and what it computes.

    Attributes:
        values: the model's own keys.
        vocabulary: the tokens in it.
        engine: llama.cpp's behaviour under these values.
        texts: that the tokens spell; none for a token that spells no whole characters.
        composes: whether the tokenizer composes characters (NFC), which llama.cpp does not.
        space_prefix: whether a space is put before a text, which tokenizers do in different ways.
        notes: what a person should know.
    """

    values: Mapping[str, TypedValue]
    vocabulary: Vocabulary
    engine: Engine
    texts: tuple[str, ...]
    composes: bool
    space_prefix: bool
    notes: tuple[str, ...] = ()


def token_values(model: str, pre: str, vocabulary: Vocabulary) -> dict[str, TypedValue]:
    """The keys that every model has: its name, its pre-tokenizer's, the tokens and their types."""
    return {
        f"{PREFIX}model": string(model),
        f"{PREFIX}pre": string(pre),
        f"{PREFIX}tokens": strings(vocabulary.texts),
        f"{PREFIX}token_type": int32s([int(kind) for kind in vocabulary.types]),
    }


def check_bpe(definition: TokenizerDefinition) -> None:
    """Refuse settings of a BPE model that llama.cpp knows nothing of.

    Raises:
        BadInputError: naming the setting.
    """
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        value = definition.model.get(key)
        if value:
            raise BadInputError(
                f"the tokenizer's BPE model has {key} = {value!r}, which llama.cpp cannot express",
                "no GGUF file can tokenize as this model does; quantize to another format",
            )
    for left, right in definition.merges:
        if " " in left or " " in right:
            raise BadInputError(
                f"the tokenizer joins {left!r} and {right!r}; a merge with a space in it cannot be "
                "written for llama.cpp, which parts the two at the first space",
                "no GGUF file can tokenize as this model does; quantize to another format",
            )
