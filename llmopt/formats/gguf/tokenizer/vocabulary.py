"""The token list of a GGUF file: one text and one type for each row of the embedding."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from llmopt.errors import BadInputError
from llmopt.formats.gguf.tokenizer.definition import TokenizerDefinition

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``, as the GGUF specification numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp knows of the tokens.

    Attributes:
        texts: in the order of their ids; no two alike, none empty.
        types: of each.
        num_unused: rows of the embedding that no token of the source belongs to.
    """

    texts: tuple[str, ...]
    types: tuple[TokenType, ...]
    num_unused: int

    @property
    def ids(self) -> dict[str, int]:
        """The id of each text."""
        return {text: index for index, text in enumerate(self.texts)}

    def has(self, index: int) -> bool:
        """Whether a token of the source has this id."""
        return 0 <= index < len(self.texts) and self.types[index] is not TokenType.UNUSED

    def of_type(self, *types: TokenType) -> list[int]:
        """The ids of these types."""
        return [index for index, kind in enumerate(self.types) if kind in types]


def build_vocabulary(
    definition: TokenizerDefinition, size: int, *, byte_tokens: bool
) -> Vocabulary:
    """List the tokens, with a placeholder in every row that none belongs to.

    Args:
        definition: the tokenizer.
        size: rows of the embedding.
        byte_tokens: whether ``<0x0A>`` and its like stand for bytes.

    Raises:
        BadInputError: a token lies outside the embedding, or two have one text or one id.
    """
    texts: dict[int, str] = {}
    model = definition.model["type"]
    for text, index in definition.pieces.items():
        _place(texts, index, text, size)
    types = dict.fromkeys(texts, TokenType.NORMAL)
    if byte_tokens:
        types |= {
            index: TokenType.BYTE for index, text in texts.items() if BYTE_TOKEN.fullmatch(text)
        }
    for token in definition.added:
        _place(texts, token.id, token.content, size)
        types[token.id] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    unknown = _unknown_id(definition) if byte_tokens or model == "Unigram" else None
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    taken = Counter(texts.values())
    text, count = taken.most_common(1)[0] if taken else ("", 0)
    if count > 1:
        raise BadInputError(
            f"the tokenizer has the token {text!r} twice, which llama.cpp does not allow",
            "give the tokens different texts in tokenizer.json",
        )
    holes = [index for index in range(size) if index not in texts]
    for index in holes:
        texts[index], types[index] = _placeholder(index, taken), TokenType.UNUSED
    return Vocabulary(
        tuple(texts[index] for index in range(size)),
        tuple(types[index] for index in range(size)),
        len(holes),
    )


def first_missing_byte(vocabulary: Vocabulary, alphabet: Sequence[str]) -> str | None:
    """The first of the 256 byte tokens that the vocabulary lacks."""
    known = set(vocabulary.texts)
    return next((text for text in alphabet if text not in known), None)


def _place(texts: dict[int, str], index: int, text: str, size: int) -> None:
    if index >= size:
        raise BadInputError(
            f"the tokenizer's token {text!r} has the id {index}, the model's embedding {size} rows",
            "use the tokenizer that belongs to the model, or enlarge the model's embedding",
        )
    if not text:
        raise BadInputError(
            f"the tokenizer's token {index} has no text, which llama.cpp cannot express",
            "give the token a text in tokenizer.json",
        )
    if texts.setdefault(index, text) != text:
        raise BadInputError(
            f"the tokenizer gives the id {index} to both {texts[index]!r} and {text!r}",
            "give each token an id of its own in tokenizer.json",
        )


def _unknown_id(definition: TokenizerDefinition) -> int | None:
    if definition.model["type"] == "Unigram":
        index: int | None = definition.model.get("unk_id")
        return index
    text = definition.model.get("unk_token")
    if text is None:
        return None
    id_of: int | None = definition.tokenizer.token_to_id(text)
    return id_of


def _placeholder(index: int, taken: Counter[str]) -> str:
    text = f"[PAD{index}]"
    while text in taken:
        text = f"[{text}]"
    taken[text] += 1
    return text
